"""The clients for asyncio. `tinkerbell.sync` has the same ones for programs that block; its docstrings say it all.

The operations of a run, and those that keep an engine busy (`forward`, `sync_adapter_to_vllm`, `generate`,
`compute_logprobs`), are plain functions that start at once and return an `asyncio.Future`; await it when you need the
result. Everything else is a coroutine, or an asynchronous iterator where the answer is a stream.

A client belongs to the event loop that it was made in.
"""

from tinkerbell.aio.sampler import AsyncSamplerClient
from tinkerbell.aio.trainer import AsyncTrainerClient, AsyncTrainingRun

__all__ = ["AsyncSamplerClient", "AsyncTrainerClient", "AsyncTrainingRun"]
