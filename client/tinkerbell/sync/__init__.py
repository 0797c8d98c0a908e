"""The clients for programs that block. They drive those of `tinkerbell.aio` on one background thread.

Operations that keep an engine busy (`forward`, `forward_backward`, `optim_step`, `sync_adapter_to_vllm`, `generate`,
`compute_logprobs`) start at once and return a `concurrent.futures.Future`; `.result()` waits. Everything else blocks
until the answer is there. Clients and runs may be shared between threads.
"""

from tinkerbell.sync.sampler import SamplerClient
from tinkerbell.sync.trainer import TrainerClient, TrainingRun

__all__ = ["SamplerClient", "TrainerClient", "TrainingRun"]
