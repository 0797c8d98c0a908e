"""What a GPU could do at best, and what it does: the notes of GPU rows say from this what bounds them."""

import functools
import re
import time
from collections.abc import Callable

import torch

from service_common.checkpoint import Checkpoint

# How cuBLAS, CUTLASS and PyTorch's grouped products name the kernels that multiply matrices.
_PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|splitKreduce", re.IGNORECASE)


@functools.cache
def peak_flops() -> float:
    """Floating-point operations per second in a large bfloat16 product: this GPU's practical ceiling."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right)


@functools.cache
def bandwidth() -> float:
    """Bytes per second that this GPU's memory is read and written with, in a copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source))


def _seconds(work: Callable[[], object], repeats: int = 10) -> float:
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def training(base: Checkpoint, adapter_parameters: int, tokens: int, seconds: float, work: Callable[[], object]) -> str:
    """What bounds a forward and backward pass that took so long; runs it once more, to see what the GPU does.

    Two floors: a frozen weight takes part in two products (2 operations each a token), an adapter's in three, at the
    speed of large products; and every frozen weight is read twice.
    """
    multiplied = base.num_parameters - base.config["hidden_size"] * base.vocab_size  # embeddings are looked up
    operations = (4 * multiplied + 6 * adapter_parameters) * tokens
    arithmetic = operations / peak_flops()
    reading = 2 * 2 * multiplied / bandwidth()
    busy, products = gpu_seconds(work)
    note = (
        f"{tokens / seconds:,.0f} tokens/s, {operations / seconds / 1e12:.0f} TFLOP/s; floors: {arithmetic * 1e3:.1f} "
        f"ms of arithmetic at {peak_flops() / 1e12:.0f} TFLOP/s, {reading * 1e3:.1f} ms to read the weights twice; the "
        f"GPU works {busy / seconds:.0%} of the time, {products / seconds:.0%} on products"
    )
    if busy < 0.8 * seconds:
        return f"{note}: launches bound it"
    return f"{note}: {'products' if products > 0.6 * busy else 'kernels other than products'} bound it"


def gpu_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Time that the GPU spends in kernels, and in those that multiply matrices."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if not event.is_user_annotation]
    kernels = [(event.key, event.self_device_time_total / 1e6) for event in events]
    busy = sum(seconds for _, seconds in kernels)
    return busy, sum(seconds for name, seconds in kernels if _PRODUCTS.search(name))
