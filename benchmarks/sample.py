"""The sampler and the way to it: against vLLM without us, and against adapters that go over the disk.

The sampler runs in this process, so that vLLM itself can be called beside it, the same engine for both sides. The
trainer is a process of its own.
"""

import asyncio
import atexit
import contextlib
import functools
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from benchmarks import harness
from benchmarks.harness import Row, Times
from sampler_service import environment
from sampler_service.config import SamplerConfig
from sampler_service.lanes import Lanes
from service_common import checkpoint, rpc
from service_common.checkpoint import Checkpoint
from service_common.lora import TARGET_MODULES
from tinkerbell import (
    AsyncSamplerClient,
    AsyncTrainerClient,
    AsyncTrainingRun,
    Datum,
    FailedPreconditionError,
    UnavailableError,
)
from tinkerbell.local import free_address

PROMPT = [504, 1296, 3707, 282, 39361, 1643, 338]  # The three laws of thermodynamics say that
STREAMS = 8


class World:
    """A sampler in this process, a trainer that publishes to it, and an adapter, "bench", that is trained."""

    def __init__(
        self,
        folder: Path,
        device: str,
        rank: int,
        *,
        kv_cache_bytes: int = 1 << 30,
        gpu_memory_utilization: float | None = None,
        trainer_options: Sequence[str] = (),
    ):
        """On a GPU both share it, and the weights stay in it."""
        environment.prepare()
        from sampler_service.engine import Engine  # noqa: PLC0415  (vLLM reads its environment when it is imported)
        from sampler_service.sampler import Sampler  # noqa: PLC0415
        from sampler_service.server import SERVICE_NAME, SamplerServicer, add_to_server  # noqa: PLC0415
        from sampler_service.tokenizer import Tokenizer  # noqa: PLC0415

        self.folder, self.device, self.rank, self.alpha = folder, device, rank, 2 * rank
        self.address, trainer_address = free_address(), free_address()
        self._loop = asyncio.Runner()
        trainer = [sys.executable, "-W", "ignore", "-m", "trainer_service", f"--model={folder}", f"--device={device}"]
        trainer += [f"--listen={trainer_address}", f"--sampler={self.address}", "--cuda-ipc", *trainer_options]
        base = checkpoint.resolve(str(folder))
        config = SamplerConfig(
            model=str(folder),
            dtype="float32" if device == "cpu" else "bfloat16",
            tensor_parallel=1,
            max_rank=max(rank, 8),
            max_loras=4,
            keep_versions=2,
            max_sequences=128,
            max_model_len=max_model_len(base),
            kv_cache_bytes=kv_cache_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            cuda_ipc=True,
            await_trainer=False,
        )
        tokenizer = Tokenizer(folder)
        self._lanes = Lanes("127.0.0.1")
        self._trainer = subprocess.Popen(trainer)
        atexit.register(self._trainer.kill)  # should there be no engine to close
        self.engine = Engine(config, base, tokenizer.present)

        async def start() -> None:
            servicer = SamplerServicer()
            await self._lanes.started()
            servicer.attach(Sampler(config, base, self.engine, tokenizer, self._lanes))
            self._server = rpc.Server(self.address, SERVICE_NAME, functools.partial(add_to_server, servicer))
            await self._server.start()
            self.sampler, self.trainer = AsyncSamplerClient(self.address), AsyncTrainerClient(trainer_address)
            self.run = await self._adapter()
            await self._publish()

        self._loop.run(start())
        self.vocab_size = base.vocab_size
        self.tokens = [token % base.vocab_size for token in PROMPT]

    def do(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Calls it on the sampler's event loop, which rests otherwise, and waits for the end."""

        async def call() -> Any:
            return await work()

        return self._loop.run(call())

    async def train(self, count: int = 2, length: int = 64) -> None:
        """One step on so many sequences."""
        rng = np.random.default_rng()
        sequences = rng.integers(0, self.vocab_size, (count, length + 1)).astype(np.int32)
        self.run.forward_backward([Datum(tokens[:-1], tokens[1:]) for tokens in sequences])
        await self.run.optim_step(learning_rate=1e-3)

    async def first_token(self) -> None:
        """Of the latest version."""
        await self.sampler.generate(self.tokens, adapter_id="bench", max_tokens=1, temperature=0)

    async def _adapter(self) -> AsyncTrainingRun:
        while True:
            with contextlib.suppress(UnavailableError, FailedPreconditionError):  # until the trainer has loaded
                return await self.trainer.create_lora_adapter("bench", rank=self.rank, alpha=self.alpha)
            if self._trainer.poll() is not None:
                raise RuntimeError("the trainer has ended")
            await asyncio.sleep(0.5)

    async def _publish(self) -> None:
        """The first version, once the trainer has found the sampler: it starts earlier, and looks again later."""
        while True:
            with contextlib.suppress(UnavailableError):
                await self.run.sync_adapter_to_vllm()
                return
            await asyncio.sleep(0.5)
            self.run = await self.trainer.training_run("bench")

    def close(self) -> None:
        """Ends everything."""
        self._trainer.kill()  # asked to end, it would wait for the sampler, whose event loop rests
        self.engine.shutdown()
        self._trainer.wait()
        self._loop.run(self._lanes.close())


def max_model_len(base: Checkpoint) -> int:
    """Enough for every row."""
    return min(512, base.max_sequence_length)


@functools.cache
def _world(quick: bool) -> World:
    """One for all rows, until the process ends."""
    name, *arguments = ("tiny-llama", "tiny", "llama") if quick else ("SmolLM2-135M-Instruct", "smollm2")
    world = World(harness.model_folder(name, *arguments), "cpu", rank=16)
    atexit.register(world.close)
    return world


class PeftAdapter:
    """An adapter as PEFT holds it, with random weights, to be saved."""

    def __init__(self, folder: Path, device: str, rank: int):
        """In the sampler's dtype. Only the adapter has memory: the base model is not used."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        with torch.device("meta"):
            base = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(folder), dtype=dtype
            )
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGET_MODULES))
        self._model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        self._factors = [
            module.to_empty(device=device)
            for name, module in self._model.named_modules()
            if name.endswith((".lora_A.default", ".lora_B.default"))
        ]
        self.draw()

    def draw(self) -> None:
        """Other random weights."""
        for factor in self._factors:
            torch.nn.init.normal_(factor.weight, std=0.02)

    def save(self, folder: Path) -> None:
        """As `save_pretrained` does it."""
        self._model.save_pretrained(str(folder))


class Disk:
    """The way over the disk, as others go it: PEFT saves, vLLM loads from the folder."""

    def __init__(self, world: World):
        self._llm = world.engine.llm
        self._adapter = PeftAdapter(world.folder, world.device, world.rank)
        self._numbers = itertools.count(1)

    @contextlib.asynccontextmanager
    async def published(self) -> AsyncIterator[Any]:
        """A LoRARequest for weights that were saved and loaded; gone after the `with` block."""
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        number = next(self._numbers)
        folder = Path(tempfile.mkdtemp(prefix="tinkerbell-bench-"))
        try:
            self._adapter.save(folder)
            lora = LoRARequest(f"disk-{number}", number, str(folder))
            await self._llm.add_lora(lora)
            yield lora
        finally:
            shutil.rmtree(folder)
            await self._llm.remove_lora(number)


async def bare_tokens(world: World, lora: Any, max_tokens: int) -> None:
    """Tokens from vLLM itself."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.inputs.engine import tokens_input  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    parameters = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    request_id = f"bare-{next(_request_ids)}"
    async for _ in world.engine.llm.generate(
        tokens_input(world.tokens), parameters, request_id=request_id, lora_request=lora
    ):
        pass


_request_ids = itertools.count()


def push_grpc_vs_disk(quick: bool) -> Row:
    """From trained weights to the first token of them."""
    world = _world(quick)
    disk = Disk(world)

    async def ours() -> None:
        await world.run.sync_adapter_to_vllm()
        await world.first_token()

    async def baseline() -> None:
        async with disk.published() as lora:
            await bare_tokens(world, lora, 1)

    times = harness.compare(
        lambda: world.do(ours), lambda: world.do(baseline), _repeats(quick), lambda: world.do(world.train)
    )
    return times.row(
        "push.grpc_vs_disk", f"rank {world.rank}, all linear layers; PEFT's save_pretrained, then vLLM's loading"
    )


def loop_memory_vs_disk(quick: bool) -> Row:
    """A training step, its weights to the sampler, 16 tokens from them."""
    world = _world(quick)
    disk = Disk(world)

    async def ours() -> None:
        await world.train()
        await world.run.sync_adapter_to_vllm()
        await world.sampler.generate(world.tokens, adapter_id="bench", max_tokens=16, temperature=0)

    async def baseline() -> None:
        await world.train()
        async with disk.published() as lora:
            await bare_tokens(world, lora, 16)

    times = harness.compare(lambda: world.do(ours), lambda: world.do(baseline), _repeats(quick))
    return times.row("loop.memory_vs_disk", "a step on 2 x 64 tokens, publish, 16 tokens")


def sample_vs_vllm(quick: bool) -> Row:
    """Eight completions at once, over gRPC and from the engine itself."""
    world = _world(quick)

    async def ours() -> None:
        results = await asyncio.gather(
            *(world.sampler.generate(world.tokens, max_tokens=32, temperature=0) for _ in range(STREAMS))
        )
        assert all(result.completions[0].finish_reason for result in results)

    async def baseline() -> None:
        await asyncio.gather(*(bare_tokens(world, None, 32) for _ in range(STREAMS)))

    times = harness.compare(lambda: world.do(ours), lambda: world.do(baseline), _repeats(quick))
    return times.row("sample.vs_vllm", f"{STREAMS} completions of 32 tokens at once, client and server in one process")


def decode_during_push(quick: bool) -> Row:
    """The 99th percentile of the time between two tokens of a stream, while versions are pushed and while not."""
    world = _world(quick)
    world.do(world.run.sync_adapter_to_vllm)
    weights = world.do(lambda: world.trainer.export_adapter_weights("bench", as_dict=True))
    versions = itertools.count(1)

    async def stream(gaps: list[float]) -> None:
        last = None
        async for _ in world.sampler.stream(world.tokens, adapter_id="bench", max_tokens=128, temperature=0):
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now

    async def pushing() -> None:
        rng = np.random.default_rng()
        while True:
            changed = {
                name: array + rng.normal(0, 1e-3, array.shape).astype(np.float32) for name, array in weights.items()
            }
            await world.sampler.push_adapter("pushed", next(versions), changed, rank=world.rank, alpha=world.alpha)
            await asyncio.sleep(0.5)

    async def measured(pushes: bool) -> float:
        gaps: list[float] = []
        task = asyncio.create_task(pushing()) if pushes else None
        await asyncio.gather(*(stream(gaps) for _ in range(4)))
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return statistics.quantiles(gaps, n=100)[-1]

    times = Times([], [])
    for _ in range(2 if quick else 3):
        times.ours.append(world.do(lambda: measured(pushes=True)))
        times.baseline.append(world.do(lambda: measured(pushes=False)))
    return times.row("sample.decode_during_push", "p99 between two tokens of 4 streams, a push of rank 16 every 0.5 s")


def _repeats(quick: bool) -> int:
    return 2 if quick else 5


ROWS = {
    "push.grpc_vs_disk": push_grpc_vs_disk,
    "loop.memory_vs_disk": loop_memory_vs_disk,
    "sample.vs_vllm": sample_vs_vllm,
    "sample.decode_during_push": decode_during_push,
}
