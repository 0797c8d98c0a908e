"""What the operator decides."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler's settings; `cli.py` has their defaults.

    model: checkpoint folder or hub name.
    dtype: "auto", "float32" or "bfloat16", of the base weights.
    tensor_parallel: GPUs, or processes on a CPU, that share every layer.
    max_rank: largest LoRA rank that a push may have.
    max_loras: adapter versions that one engine step can mix; requests on more wait.
    keep_versions: live versions kept per adapter besides those with running requests.
    max_sequences: most completions and sequences to score that may run or wait in the engine; more are refused.
    max_model_len: longest sequence in tokens, None for as long as the model can.
    kv_cache_bytes: memory for keys and values. None for 1 GiB on a CPU, and on a GPU for what vLLM finds left of its
        share when it starts, which others may be taking at that moment.
    gpu_memory_utilization: vLLM's share of a GPU's memory, with weights, keys and values; None for vLLM's default.
    cuda_ipc: whether trainers on the same host may have it read payloads out of their GPU memory.
    await_trainer: not to report ready before the trainer has brought it up to date.
    """

    model: str
    dtype: str
    tensor_parallel: int
    max_rank: int
    max_loras: int
    keep_versions: int
    max_sequences: int
    max_model_len: int | None
    kv_cache_bytes: int | None
    gpu_memory_utilization: float | None
    cuda_ipc: bool
    await_trainer: bool
