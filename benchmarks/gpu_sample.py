"""Sampler and trainer on one GPU, in the shape of Llama-3.1-8B: pushes, the loop between both, samples, agreement.

As on a CPU the sampler runs in this process and the trainer in its own; see sample.py.
"""

import asyncio
import atexit
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from benchmarks import bounds, harness
from benchmarks.harness import Row
from benchmarks.offline import Work
from benchmarks.sample import Disk, PeftAdapter, World, bare_tokens, max_model_len
from service_common import checkpoint
from tinkerbell import Verification
from tinkerbell.inputs import Transport
from tinkerbell.results import LogprobDifference

# This process has used the GPU before vLLM starts its own from it.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

RANK = 32
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# 4 GiB hold 32,768 tokens, nearly twice what the rows need. With 16 GB of weights, adapters and graphs vLLM takes about
# 24 of 80 GB. The trainer has what is left, and makes passes that leave room for its own 16.
KV_CACHE_BYTES = (4 if ON_GPU else 1) << 30
GPU_MEMORY_UTILIZATION = 0.3
TRAINER_OPTIONS = ("--max-pass-tokens=2048",)


def _folder(quick: bool) -> Path:
    return harness.model_folder(*(("tiny-llama", "tiny", "llama") if quick else ("random-llama-8b", "llama-8b")))


@functools.cache
def _world(folder: Path) -> World:
    """One for all rows, until the process ends."""
    world = World(
        folder,
        DEVICE,
        RANK,
        kv_cache_bytes=KV_CACHE_BYTES,
        gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
        trainer_options=TRAINER_OPTIONS,
    )
    atexit.register(world.close)
    return world


def _repeats(quick: bool) -> int:
    return 2 if quick else 5


# Samples


@functools.cache
def _adapters(quick: bool) -> list[Path]:
    """PEFT folders that hold four adapters with random weights, until the process ends."""
    parent = Path(tempfile.mkdtemp(prefix="tinkerbell-bench-"))
    atexit.register(shutil.rmtree, parent)
    folders = [parent / f"lora-{index}" for index in range(4)]
    adapter = PeftAdapter(_folder(quick), DEVICE, RANK)  # takes ten seconds to make
    for folder in folders:
        adapter.draw()
        adapter.save(folder)
    return folders


@functools.cache
def _offline(quick: bool) -> tuple[Work, dict[str, list[float]]]:
    """What vLLM does by itself, measured before our engine starts."""
    base = checkpoint.resolve(str(_folder(quick)))
    work = Work(
        model=str(_folder(quick)),
        adapters=[str(folder) for folder in _adapters(quick)],
        rank=RANK,
        count=8 if quick else 128,
        new_tokens=8 if quick else 128,
        max_model_len=max_model_len(base),
        vocab_size=base.vocab_size,
        kv_cache_bytes=KV_CACHE_BYTES,
        gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
        repeats=2 if quick else 3,
    )
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.offline", work.json(), out.name], check=True)
        return work, json.loads(Path(out.name).read_text())


def sample_vs_vllm(quick: bool, adapters: int) -> Row:
    """Many completions at once, over gRPC, and from vLLM's own class for batches."""
    work, theirs = _offline(quick)
    reading = 2 * checkpoint.resolve(work.model).num_parameters / bounds.bandwidth() if ON_GPU else 0
    torch.cuda.empty_cache()  # the engines need it
    world = _world(_folder(quick))
    prompts = work.prompts()

    async def ours() -> int:
        batches = await asyncio.gather(
            *(
                world.sampler.generate_batch(
                    prompts[index::adapters], adapter_id=f"lora-{index}", max_tokens=work.new_tokens, temperature=0
                )
                for index in range(adapters)
            )
        )
        return sum(len(completion.tokens) for batch in batches for result in batch for completion in result.completions)

    for index in range(adapters):
        world.do(functools.partial(_push, world, _adapters(quick)[index]))
    rates, seconds = [], []
    for _ in range(1 + work.repeats):
        started = time.perf_counter()
        tokens = world.do(ours)
        seconds.append(time.perf_counter() - started)
        rates.append(tokens / seconds[-1])
    step = statistics.median(seconds[1:]) / work.new_tokens
    note = (
        f"{work.count} x {work.new_tokens} tokens, {adapters} of rank {RANK}; GenerateBatch against vLLM's LLM "
        f"class; at least 0.95 wanted; {step * 1e3:.1f} ms a step, {reading * 1e3:.1f} ms to read the weights"
    )
    return Row(
        f"sample.vs_vllm_{adapters}",
        statistics.median(rates[1:]),
        statistics.median(theirs[str(adapters)]),
        "tokens/s",
        note,
    )


async def _push(world: World, folder: Path) -> None:
    weights = {
        name.replace(".default", ""): tensor.float().numpy()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    await world.sampler.push_adapter(folder.name, 1, weights, rank=RANK, alpha=2 * RANK)


# Pushes


async def _pushes(world: World, number: int, transport: Transport = "auto") -> None:
    """Of new weights each, as soon as one has followed the other."""
    for _ in range(number):
        await world.train(1, 16)
        await world.run.sync_adapter_to_vllm(transport=transport)
    await asyncio.sleep(3)  # a version that nobody uses goes after a second


@contextlib.contextmanager
def _timed_installs(world: World) -> Iterator[list[float]]:
    """Seconds that the sampler has waited for its workers to install a version, one by one."""
    llm, seconds = world.engine.llm, []
    original = llm.collective_rpc

    async def collective_rpc(method: str, **arguments: Any) -> Any:
        started = time.perf_counter()
        answer = await original(method, **arguments)
        if method == "tinkerbell_install":
            seconds.append(time.perf_counter() - started)
        return answer

    llm.collective_rpc = collective_rpc
    try:
        yield seconds
    finally:
        llm.collective_rpc = original


def push_vs_disk(quick: bool, transport: Transport, wanted: float) -> Row:
    """From trained weights to the first token of them."""
    world = _world(_folder(quick))
    disk = Disk(world)
    syncs, sent = [], []
    # Until every buffer has been used, and the processes run that help.
    world.do(functools.partial(_pushes, world, 2 if quick else 20, transport))

    async def ours() -> None:
        started = time.perf_counter()
        result = await world.run.sync_adapter_to_vllm(transport=transport)
        syncs.append(time.perf_counter() - started)
        sent.append(result.sent_bytes)
        await world.first_token()

    async def baseline() -> None:
        async with disk.published() as lora:
            await bare_tokens(world, lora, 1)

    with _timed_installs(world) as installs:
        times = harness.compare(
            lambda: world.do(ours), lambda: world.do(baseline), _repeats(quick), lambda: world.do(world.train)
        )
    sync = statistics.median(syncs[1:])
    token = statistics.median(times.ours) - sync
    note = (
        f"{sent[-1] / 1e6:.0f} MB; PEFT's save_pretrained, then vLLM's loading; at least {wanted} wanted; SyncAdapter "
        f"{sync * 1e3:.1f} ms, {statistics.median(installs[1:]) * 1e3:.1f} of them in vLLM's workers; the first token, "
        f"a step of the model, {token * 1e3:.1f} ms"
    )
    return times.row(f"push.{transport}_vs_disk", note)


def loop_memory_vs_disk(quick: bool) -> Row:
    """An iteration of reinforcement learning: samples, a training step on as much, its weights to the sampler."""
    world = _world(_folder(quick))
    disk = Disk(world)
    sequences, length, streams, new_tokens = (2, 32, 2, 4) if quick else (2, 2048, 8, 4)
    parts: dict[str, list[float]] = {"train": [], "sync": [], "generate": []}

    async def timed(part: str, work) -> None:
        started = time.perf_counter()
        await work
        parts[part].append(time.perf_counter() - started)

    async def ours() -> None:
        await timed("train", world.train(sequences, length))
        await timed("sync", world.run.sync_adapter_to_vllm())
        batch = world.sampler.generate_batch(
            [world.tokens] * streams, adapter_id="bench", max_tokens=new_tokens, temperature=0
        )
        await timed("generate", batch)

    async def baseline() -> None:
        await world.train(sequences, length)
        async with disk.published() as lora:
            await asyncio.gather(*(bare_tokens(world, lora, new_tokens) for _ in range(streams)))

    times = harness.compare(lambda: world.do(ours), lambda: world.do(baseline), _repeats(quick))
    medians = ", ".join(f"{part} {statistics.median(seconds[1:]):.3f} s" for part, seconds in parts.items())
    note = (
        f"a step on {sequences} x {length} tokens, publish, {streams} x {new_tokens} tokens: training takes about as "
        f"long as the way over the disk and sampling a fifth; at least 1.76 wanted; {medians}"
    )
    return times.row("loop.memory_vs_disk", note)


def repeated_pushes(quick: bool) -> Row:
    """What two services have in memory and open before and after 200 pushes."""
    world = _world(_folder(quick))
    count = 5 if quick else 200
    world.do(functools.partial(_pushes, world, count))  # until pools and caches have their size
    before = _usage()
    world.do(functools.partial(_pushes, world, count))
    after = _usage()
    changes = ", ".join(f"{name} {before[name]:,.0f} to {after[name]:,.0f}" for name in before)
    return Row(
        "push.200",
        after["device MB"] + after["host MB"],
        before["device MB"] + before["host MB"],
        "MB",
        f"memory after and before {count} pushes of new weights; wanted: no growth; {changes}",
    )


def _usage() -> dict[str, float]:
    """Of this process, the sampler's engine and the trainer; of the device all that is taken."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    free, total = torch.cuda.mem_get_info() if ON_GPU else (0, 0)
    return {
        "device MB": (total - free) / 1e6,
        "host MB": sum(process.memory_full_info().pss for process in processes) / 1e6,
        "file descriptors": sum(process.num_fds() for process in processes),
        "shared memory files": len(os.listdir("/dev/shm")),
    }


# Agreement


def parity(quick: bool, name: str) -> Row:
    """How far trainer and sampler are apart on random tokens, and on such as the sampler drew, after three steps."""
    folder = _folder(quick)
    if name == "smollm2" and not quick:
        folder = harness.model_folder("SmolLM2-135M-Instruct", "smollm2")
    world = _world(folder)
    length = 32 if quick else 256
    rows = np.random.default_rng(0).integers(0, world.vocab_size, (4, length))

    async def difference(sequences: list[np.ndarray]) -> LogprobDifference:
        (replica,) = (await world.run.verify_adapter(Verification(sequences, tolerance=1.0))).replicas
        if replica.difference is None:
            raise RuntimeError(replica.error)
        return replica.difference

    async def compared() -> tuple[LogprobDifference, LogprobDifference]:
        for _ in range(3):
            await world.train()
        await world.run.sync_adapter_to_vllm()
        starts = rows[:, :4]
        drawn = await world.sampler.generate_batch(list(starts), adapter_id="bench", max_tokens=length - 4, seed=0)
        tokens = [
            np.concatenate((start, result.completions[0].tokens)) for start, result in zip(starts, drawn, strict=True)
        ]
        return await difference(list(rows)), await difference(tokens)

    random, drawn = world.do(compared)
    note = (
        f"mean difference of trainer and sampler over {random.tokens} random tokens with an adapter, largest "
        f"{random.max:.3g}; the baseline is what is allowed; {drawn.mean:.3g} over {drawn.tokens} tokens that the "
        f"sampler drew, largest {drawn.max:.3g}"
    )
    return Row(f"parity.{name}", random.mean, 0.02, "nats", note)


ROWS = {
    "sample.vs_vllm_1": functools.partial(sample_vs_vllm, adapters=1),
    "sample.vs_vllm_4": functools.partial(sample_vs_vllm, adapters=4),
    "push.grpc_vs_disk": functools.partial(push_vs_disk, transport="grpc", wanted=3),
    "push.cuda_ipc_vs_disk": functools.partial(push_vs_disk, transport="cuda_ipc", wanted=25),
    "loop.memory_vs_disk": loop_memory_vs_disk,
    "parity.llama_8b": functools.partial(parity, name="llama_8b"),
    "push.200": repeated_pushes,
    "parity.smollm2": functools.partial(parity, name="smollm2"),
}
