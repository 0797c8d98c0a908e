"""Samplers of one and of several ranks, and pushes to them from a trainer of several, as services on one host."""

import asyncio
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.scale_plan import RANK, REPEATS
from service_common import checkpoint
from service_common.lora import TARGET_MODULES, tensor_shapes
from tinkerbell import AsyncSamplerClient, AsyncTrainerClient, Datum, UnavailableError
from tinkerbell.inputs import Transport
from tinkerbell.local import LocalServices, ServiceSpec, free_address
from tinkerbell.v1 import common_pb2

LOGS = harness.ROOT / "out/benchmarks/scale"
_READY_SECONDS = 600.0  # ten engines on two cores
_WARM_UP = 10  # pushes, until buffers have been used and the processes that help run
_WANTED = 1 / 1.3  # of the time to one replica, for the time to several


class Services:
    """What runs where, and the names of the rows that come of it.

    ranks: of the trainer and of the largest sampler, and as many replicas of one rank: up to four. Where there are GPUs
    enough, trainer and samplers have their own.
    """

    def __init__(self, num_gpus: int, quick: bool):
        self.quick = quick
        self.on_gpu = torch.cuda.is_available()
        self.ranks = 1 << (min(num_gpus, 4).bit_length() - 1)
        self.transports: list[Transport] = ["grpc", "cuda_ipc"] if self.on_gpu else ["grpc"]
        self._num_gpus = num_gpus
        self._first_gpu = self.ranks if num_gpus >= 2 * self.ranks else 0  # of the samplers
        self.samplers = {size: free_address() for size in (1, 2, 4) if size <= self.ranks}  # by their ranks
        self.replicas = [self.samplers[1], *(free_address() for _ in range(self.ranks - 1))]
        self.trainers = {"one": free_address(), "ranks": free_address(), "all": free_address()}  # by where they publish

    @functools.cached_property
    def model(self) -> Path:
        """The base model's folder, made if it is not there."""
        return harness.model_folder(
            *(("tiny-llama", "tiny", "llama") if self.quick else ("random-llama-8b", "llama-8b"))
        )

    @property
    def names(self) -> list[str]:
        """Of all rows, those included for which there are too few GPUs."""
        ranks = sorted({self.ranks, 4}) if self.ranks > 1 else [4]
        samples = [f"sample.tp{size}" for size in (1, 2, 4)]
        return samples + [
            push_name(count, target, transport)
            for count in ranks
            for transport in self.transports
            for target in ("ranks", "all")
        ]

    @property
    def too_large(self) -> dict[str, int]:
        """GPUs that rows need of which there are too few."""
        samples = {f"sample.tp{size}": size for size in (1, 2, 4) if size > self.ranks}
        pushes = [push_name(4, target, transport) for transport in self.transports for target in ("ranks", "all")]
        return samples | ({} if self.ranks == 4 else dict.fromkeys(pushes, 4))

    def specs(self) -> list[ServiceSpec]:
        """How to start all of it."""
        model = f"--model={self.model}"
        specs = []
        for size, address in self.samplers.items():
            specs.append(self._sampler(f"sampler-tp{size}", size, self._first_gpu, address, model))
        for index, address in enumerate(self.replicas[1:], 1):
            specs.append(self._sampler(f"sampler-{index}", 1, self._first_gpu + index, address, model))
        targets = {"one": self.replicas[:1], "ranks": [self.samplers[self.ranks]], "all": self.replicas}
        for name, address in self.trainers.items() if self.ranks > 1 else []:
            options = [f"--tensor-parallel={self.ranks}", "--max-pass-tokens=2048", f"--listen={address}", model]
            options += [f"--device={'cuda' if self.on_gpu else 'cpu'}", *(["--cuda-ipc"] if self.on_gpu else [])]
            options += [f"--sampler={sampler}" for sampler in targets[name]]
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
            command = (sys.executable, *torchrun, "-m", "trainer_service", *options)
            specs.append(self._spec(f"trainer-{name}", 0, command, address, "tinkerbell.v1.TrainerService"))
        return specs

    def _sampler(self, name: str, size: int, gpu: int, address: str, model: str) -> ServiceSpec:
        options = [
            model,
            f"--listen={address}",
            f"--tensor-parallel={size}",
            f"--max-rank={RANK}",
            "--max-model-len=256",
        ]
        if self.on_gpu:  # several share one
            options += ["--cuda-ipc", "--kv-cache-gib=3", f"--gpu-memory-utilization={0.3 if size == 1 else 0.2}"]
        else:
            options += ["--dtype=float32", "--kv-cache-gib=1"]
        command = (sys.executable, "-m", "sampler_service", *options)
        return self._spec(name, gpu, command, address, "tinkerbell.v1.SamplerService")

    def _spec(self, name: str, gpu: int, command: Sequence[str], address: str, health_service: str) -> ServiceSpec:
        """On GPUs from this one on. It sees the others too, whose memory it may have to read."""
        order = ",".join(str((gpu + index) % self._num_gpus) for index in range(self._num_gpus))
        return ServiceSpec(name, ("env", f"CUDA_VISIBLE_DEVICES={order}", *command), address, health_service)


def push_name(ranks: int, target: str, transport: Transport) -> str:
    """Of the row of a trainer of so many ranks, to "ranks" or to "all" replicas."""
    return f"push.tp{ranks}_to_{f'tp{ranks}' if target == 'ranks' else f'{ranks}_replicas'}.{transport}"


def service_rows(services: Services) -> list[Row]:
    """Starts all services, measures one after the other, and ends them; what they say is in LOGS."""
    running = LocalServices(services.specs(), LOGS)
    running.start()
    try:
        running.wait_ready(_READY_SECONDS)
        return asyncio.run(_rows(services))
    finally:
        running.stop(grace_seconds=0)


async def _rows(services: Services) -> list[Row]:
    rows = await _push_rows(services) if services.ranks > 1 else []
    rates = {size: await _tokens_per_second(services, address) for size, address in services.samplers.items()}
    for size, rate in rates.items():
        note = f"GenerateBatch of 128 x 128 tokens with an adapter of rank {RANK}, TP={size}; against {size} times TP=1"
        rows.append(Row(f"sample.tp{size}", rate, size * rates[1], "tokens/s", note))
    return rows


async def _push_rows(services: Services) -> list[Row]:
    clients = {name: AsyncTrainerClient(address) for name, address in services.trainers.items()}
    expected = {"one": 1, "ranks": 1, "all": services.ranks}
    runs = {name: await client.create_lora_adapter(name, rank=RANK) for name, client in clients.items()}
    rng = np.random.default_rng(0)
    sent = 0
    seconds: dict[tuple[str, Transport], list[float]] = {}
    for transport in services.transports:
        for _ in range(_WARM_UP + REPEATS):
            for name, run in runs.items():
                tokens = rng.integers(0, 500, 17)
                run.forward_backward([Datum(tokens[:-1], tokens[1:])])
                await run.optim_step(learning_rate=1e-3)
                elapsed, result = await _synced(run, transport)
                if [replica.transport for replica in result.replicas] != [transport] * expected[name]:
                    raise RuntimeError(f"{name} was not published by {transport} alone: {result.replicas}")
                seconds.setdefault((name, transport), []).append(elapsed)
                sent = result.sent_bytes // expected[name]
    for client in clients.values():
        await client.close()
    rows = []
    for transport in services.transports:
        one = statistics.median(seconds["one", transport][_WARM_UP:])
        for target, what in (
            ("ranks", f"to a sampler of TP={services.ranks}"),
            ("all", f"to {services.ranks} of TP=1"),
        ):
            note = (
                f"SyncAdapter of {sent / 1e6:.0f} MB from a trainer of TP={services.ranks} {what}; against one of TP=1"
            )
            wanted = f"; at least {_WANTED:.2f} wanted" if target == "all" else ""
            time_taken = statistics.median(seconds[target, transport][_WARM_UP:])
            rows.append(Row(push_name(services.ranks, target, transport), time_taken, one, "s", note + wanted))
    return rows


async def _synced(run, transport: Transport):
    """Seconds and the result; waits for a trainer that has not found its samplers yet."""
    while True:
        started = time.perf_counter()
        try:
            result = await run.sync_adapter_to_vllm(transport=transport)
        except UnavailableError:
            await asyncio.sleep(0.5)
        else:
            return time.perf_counter() - started, result


async def _tokens_per_second(services: Services, address: str) -> float:
    count, new_tokens = (4, 8) if services.quick else (128, 128)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 500, 32).tolist() for _ in range(count)]
    config = common_pb2.LoraConfig(rank=RANK, alpha=2 * RANK, target_modules=TARGET_MODULES)
    shapes = tensor_shapes(checkpoint.resolve(str(services.model)), config)
    weights = {name: rng.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes}
    async with AsyncSamplerClient(address) as client:
        await client.push_adapter("sampled", 1, weights, rank=RANK, alpha=2 * RANK)
        rates = []
        for _ in range(1 + REPEATS):
            started = time.perf_counter()
            results = await client.generate_batch(prompts, adapter_id="sampled", max_tokens=new_tokens, temperature=0)
            tokens = sum(len(completion.tokens) for result in results for completion in result.completions)
            rates.append(tokens / (time.perf_counter() - started))
        return statistics.median(rates[1:])
