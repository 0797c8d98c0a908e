"""Trainers of one rank and of two publish by CUDA IPC, to a sampler on another GPU and to one whose layers are on both.

Where there is one GPU, the trainer's ranks and the first sampler share it, and there is no other sampler.

Trainer and samplers score the same tokens alike: mean absolute difference at most 0.02 in bfloat16.
"""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch
from processes import (
    ROOT,
    ServiceProcess,
    made_model,
    rank_environment,
    start_sampler,
    two_gpu_ranks,
    wait_ready,
)

from tinkerbell import AsyncSamplerClient, AsyncTrainerClient, Datum, Verification
from tinkerbell.local import free_address

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NUM_GPUS = torch.cuda.device_count()
TOLERANCE = 0.02
TOKENS = np.random.default_rng(0).integers(0, 400, (4, 48)).astype(np.int32)
TRAINERS = {
    "one rank": (1, []),
    "TP=2": (2, ["--tensor-parallel=2"]),
    "TP=2, sequence parallel": (2, ["--tensor-parallel=2", "--sequence-parallel"]),
    "PP=2": (2, ["--pipeline-parallel=2"]),
    "DP=2": (2, []),
}


@pytest.fixture(scope="module")
def samplers() -> Iterator[list[ServiceProcess]]:
    """One on the last GPU, which must see the others as well to read their memory, and one of two ranks."""
    model = made_model("tiny-llama", "tiny", "llama")
    options = ("--cuda-ipc", "--dtype=bfloat16", "--max-model-len=64", "--max-rank=8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, reversed(range(NUM_GPUS)))))
        started = [start_sampler(model, *options)]
    if NUM_GPUS > 1:
        started.append(start_sampler(model, *options, "--tensor-parallel=2"))
    try:
        yield [wait_ready(sampler) for sampler in started]
    finally:
        for sampler in started:
            sampler.stop()


@pytest.fixture(params=TRAINERS)
def trainer(request, samplers: list[ServiceProcess]) -> Iterator[ServiceProcess]:
    """It publishes to all of them."""
    ranks, options = TRAINERS[request.param]
    program = two_gpu_ranks("trainer_service") if ranks == 2 else [sys.executable, "-m", "trainer_service"]
    address = free_address()
    options = ["--cuda-ipc", "--device=cuda", f"--listen={address}", *options]
    options += [f"--sampler={sampler.address}" for sampler in samplers]
    model = made_model("tiny-llama", "tiny", "llama")
    process = subprocess.Popen([*program, f"--model={model}", *options], cwd=ROOT, env=rank_environment())
    try:
        yield wait_ready(ServiceProcess("tinkerbell.v1.TrainerService", address, process))
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
        for member in family:
            member.kill()
        process.wait()


@pytest.mark.timeout(600)
async def test_samplers_serve_what_ranks_trained(request, samplers, trainer) -> None:
    name = request.node.callspec.id.replace(" ", "-").replace("=", "-").replace(",", "")
    data = [Datum(tokens[:-1], tokens[1:]) for tokens in TOKENS]
    async with AsyncTrainerClient(trainer.address) as client:
        run = await client.create_lora_adapter(name, rank=8)
        losses = []
        for _ in range(3):
            trained = run.forward_backward(data)
            await run.optim_step(learning_rate=1e-2)
            losses.append((await trained).metrics["loss:mean"])
            published = await run.sync_adapter_to_vllm(
                verify=Verification(list(TOKENS), tolerance=TOLERANCE), transport="cuda_ipc"
            )
            assert [replica.transport for replica in published.replicas] == ["cuda_ipc"] * len(samplers)
        assert losses[2] < losses[0]
    for address in (sampler.address for sampler in samplers):
        async with AsyncSamplerClient(address) as sampler:
            adapted = (await sampler.compute_logprobs(TOKENS, adapter_id=name)).logprobs
            of_base = (await sampler.compute_logprobs(TOKENS)).logprobs
            assert np.abs(np.concatenate(adapted) - np.concatenate(of_base)).mean() > 5 * TOLERANCE
