"""Weights from a trainer's GPU to a sampler on another one, and to a sampler that shares its layers out on both.

Trainer and samplers score the same tokens alike: mean absolute difference at most 0.02 in bfloat16.
"""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch
from processes import ROOT, ServiceProcess, made_model, start_sampler, wait_ready

from tinkerbell import AsyncSamplerClient, AsyncTrainerClient, Datum, Verification
from tinkerbell.local import free_address

pytestmark = [pytest.mark.engine, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

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
    """One on the second GPU, which must see the first one as well to read its memory, and one of two ranks."""
    model = made_model("tiny-llama", "tiny", "llama")
    options = ("--cuda-ipc", "--dtype=bfloat16", "--max-model-len=64", "--max-rank=8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        started = [start_sampler(model, *options)]
    started.append(start_sampler(model, *options, "--tensor-parallel=2"))
    try:
        yield [wait_ready(sampler) for sampler in started]
    finally:
        for sampler in started:
            sampler.stop()


@pytest.fixture(params=TRAINERS)
def trainer(request, samplers: list[ServiceProcess]) -> Iterator[ServiceProcess]:
    """It publishes to both."""
    ranks, options = TRAINERS[request.param]
    address = free_address()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    options = ["--cuda-ipc", "--device=cuda", f"--listen={address}", *options]
    options += [f"--sampler={sampler.address}" for sampler in samplers]
    model = made_model("tiny-llama", "tiny", "llama")
    command = [sys.executable, *torchrun, "-m", "trainer_service", f"--model={model}", *options]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield wait_ready(ServiceProcess("tinkerbell.v1.TrainerService", address, process))
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
        for member in family:
            member.kill()
        process.wait()


@pytest.mark.timeout(600)
async def test_what_is_trained_on_one_gpu_is_served_by_others(request, samplers, trainer) -> None:
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
            assert [replica.transport for replica in published.replicas] == ["cuda_ipc", "cuda_ipc"]
        assert losses[2] < losses[0]
    for address in (sampler.address for sampler in samplers):
        async with AsyncSamplerClient(address) as sampler:
            adapted = (await sampler.compute_logprobs(TOKENS, adapter_id=name)).logprobs
            of_base = (await sampler.compute_logprobs(TOKENS)).logprobs
            assert np.abs(np.concatenate(adapted) - np.concatenate(of_base)).mean() > 5 * TOLERANCE
