"""Services that are killed in the middle of a push: what is served afterwards is whole, and pushes go on."""

import asyncio
import contextlib
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from processes import ServiceProcess, start_sampler, start_trainer, wait_ready
from sampler_worlds import SamplerWorld

from service_common.checkpoint import Checkpoint
from tinkerbell import AsyncSamplerClient, AsyncTrainerClient, AsyncTrainingRun, Datum, Retry, TinkerbellError, payload
from tinkerbell.local import free_address

pytestmark = pytest.mark.engine

TOLERANCE = 0.01
TOKENS = [104, 236, 282, 464, 314, 253, 112, 281, 260, 224]
CHUNKS = -(-19_537_920 // payload.CHUNK_BYTES)  # of SmolLM2's adapter of rank 16 in float32

# Failpoints, each with the count at which it kills in the push that is meant to fail. The sampler has had two pushes
# before, and only in the second of them, which had a probe, was asked to prepare.
IN_THE_THIRD_PUSH = {
    "push.begun": 3,
    "push.chunk": 2 * CHUNKS + CHUNKS // 2,
    "push.prepared": 2,
    "push.committing": 3,
    "push.committed": 3,
}
# The trainer has published once before, to two samplers. sync.committing comes once for each of them: one has made the
# version live, the other one has not.
IN_THE_SECOND_SYNC = {"sync.begun": 2, "sync.prepared": 2, "sync.committing": 3, "sync.committed": 2}
IN_MAKE_TEST = "sync.committing"


@contextlib.contextmanager
def killed_in_the_end(services: list[ServiceProcess]) -> Iterator[None]:
    """For services that are added to the list as they start."""
    try:
        yield
    finally:
        for service in services:
            service.process.kill()
            service.process.wait()


async def train(run: AsyncTrainingRun) -> np.ndarray:
    """One step on tokens of its own, so that there is always something to learn.

    Returns the trainer's log-probabilities of TOKENS after it.
    """
    tokens = np.random.default_rng().permutation(TOKENS)
    run.forward_backward([Datum(tokens[:-1], tokens[1:])])
    run.optim_step(learning_rate=3e-3)
    return (await run.forward([Datum(TOKENS[:-1], TOKENS[1:])])).logprobs[0]


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    return float(np.abs(one - other).mean()) <= TOLERANCE


@pytest.mark.faults
@pytest.mark.timeout(3600)
async def test_a_sampler_that_is_killed_in_a_push_comes_back_whole(smollm2) -> None:
    """It is told apart by its log-probabilities, which are the trainer's of before the push."""
    sampler_address = free_address()
    trainer = start_trainer(f"--model={smollm2}", f"--sampler={sampler_address}")
    services = [trainer]

    def start(point: str | None) -> ServiceProcess:
        die_at = f"{point}:{IN_THE_THIRD_PUSH[point]}" if point else ""
        options = ("--dtype=float32", "--max-model-len=256", "--await-trainer")
        services.append(start_sampler(smollm2, *options, address=sampler_address, die_at=die_at))
        return services[-1]

    async def served() -> tuple[int, np.ndarray]:
        result = await sampler.compute_logprobs([TOKENS], adapter_id="eve")
        return result.served_by.version, result.logprobs[0]

    points = list(IN_THE_THIRD_PUSH)
    with killed_in_the_end(services):
        async with AsyncTrainerClient(trainer.address) as client, AsyncSamplerClient(sampler_address) as sampler:
            process = start(points[0])
            await asyncio.to_thread(wait_ready, trainer)
            await asyncio.to_thread(wait_ready, process)
            run = await client.create_lora_adapter("eve", rank=16)
            await train(run)
            await run.sync_adapter_to_vllm()
            for point, following in zip(points, [*points[1:], None], strict=True):
                old = await train(run)
                published = await run.sync_adapter_to_vllm(verify=True)
                assert alike((await served())[1], old)
                new = await train(run)
                assert not alike(old, new)
                engine = psutil.Process(process.process.pid).children(recursive=True)
                with pytest.raises(TinkerbellError) as failure:
                    await run.sync_adapter_to_vllm(verify=point == "push.prepared")
                lost_at_begin = point == "push.begun"
                assert failure.value.reason == ("SAMPLER_UNREACHABLE" if lost_at_begin else "PUSH_FAILED"), point
                assert await asyncio.to_thread(process.process.wait, 60) == -9, point
                _, orphans = await asyncio.to_thread(psutil.wait_procs, engine, 10)
                assert not orphans, point
                process = start(following)
                await asyncio.to_thread(wait_ready, process)
                version, logprobs = await served()
                assert version == published.version, point
                assert alike(logprobs, old), point
            await run.sync_adapter_to_vllm(verify=True)
            assert alike((await served())[1], new)


@pytest.mark.parametrize(
    "point",
    [point if point == IN_MAKE_TEST else pytest.param(point, marks=pytest.mark.faults) for point in IN_THE_SECOND_SYNC],
)
async def test_a_trainer_that_is_killed_in_a_push_leaves_all_samplers_at_one_whole_version(
    tiny_model, tmp_path, point
) -> None:
    worlds = [await SamplerWorld(Checkpoint("model", tiny_model)).start() for _ in range(2)]
    samplers = [f"--sampler={world.address}" for world in worlds]
    options = (f"--model={tiny_model}", f"--checkpoints={tmp_path}", *samplers)
    trainer = start_trainer(*options, die_at=f"{point}:{IN_THE_SECOND_SYNC[point]}")
    services = [trainer]
    async with contextlib.AsyncExitStack() as cleanup:
        cleanup.enter_context(killed_in_the_end(services))
        for world in worlds:
            cleanup.push_async_callback(world.stop)
        async with AsyncTrainerClient(trainer.address, retry=Retry(total_seconds=300)) as client:
            await asyncio.to_thread(wait_ready, trainer)
            run = await client.create_lora_adapter("eve", rank=4)
            await run.save_checkpoint()
            first = await run.sync_adapter_to_vllm()
            await train(run)
            lost = run.sync_adapter_to_vllm()
            assert await asyncio.to_thread(trainer.process.wait, 60) == -9
            before = [latest(world) for world in worlds]
            if point == "sync.committing":
                assert {version for version, _ in before} == {1, 2}
            services.append(start_trainer(*options, address=trainer.address))
            with pytest.raises(TinkerbellError) as refusal:
                await lost
            assert refusal.value.reason == "ADAPTER_RESTORED"
            async with asyncio.timeout(60):
                while latest(worlds[0]) != latest(worlds[1]):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert latest(worlds[0]) == max(before)
            if point in ("sync.begun", "sync.prepared"):
                assert latest(worlds[0]) == (1, first.digest)
            run = await client.training_run("eve")
            await train(run)
            again = await run.sync_adapter_to_vllm()
            assert again.version > max(before)[0]
            assert [latest(world) for world in worlds] == [(again.version, again.digest)] * 2


def latest(world: SamplerWorld) -> tuple[int, str]:
    """The latest version, and the digest that its bytes have."""
    version = world.sampler.registry.latest("eve")
    digest = payload.digest(version.manifest, version.payload.view)
    assert digest == version.digest
    assert version.lora_id in world.engine.installed
    return version.version, digest
