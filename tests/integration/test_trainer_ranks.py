"""The trainer as a service on two ranks, under torchrun."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import ROOT, ServiceProcess, made_model, wait_ready

from tinkerbell import AsyncTrainerClient, Datum, FailedPreconditionError, InvalidArgumentError
from tinkerbell.local import free_address

pytestmark = [pytest.mark.engine, pytest.mark.cpu_only]

DATA = [Datum(list(range(1, 20)), list(range(2, 21))), Datum([7, 8, 9], [8, 9, 10])]


@pytest.fixture
def service(tmp_path: Path):
    address = free_address()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    model = made_model("tiny-llama", "tiny", "llama")
    options = ["--model", model, "--device", "cpu", "--listen", address, "--checkpoints", tmp_path]
    command = [sys.executable, *torchrun, "-m", "trainer_service", *map(str, options), "--tensor-parallel", "2"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield wait_ready(ServiceProcess("tinkerbell.v1.TrainerService", address, process))
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


def rank_process(torchrun: subprocess.Popen, rank: int) -> psutil.Process:
    (found,) = (
        child
        for child in psutil.Process(torchrun.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank) and "trainer_service" in child.cmdline()
    )
    return found


@pytest.mark.timeout(600)
async def test_a_group_that_loses_a_rank_restarts_and_restores_its_adapters(service: ServiceProcess) -> None:
    async with AsyncTrainerClient(service.address) as client:
        info = await client.get_backend_info()
        assert (info.parallelism.world_size, info.parallelism.tensor) == (2, 2)
        run = await client.create_lora_adapter("ada", rank=4)
        with pytest.raises(InvalidArgumentError):  # refused by all ranks alike, and the group goes on
            await client.create_lora_adapter("wide", rank=4096)
        losses = []
        for _ in range(3):
            result = run.forward_backward(DATA)
            await run.optim_step(learning_rate=1e-2)
            losses.append((await result).metrics["loss:mean"])
        assert losses[2] < losses[0]
        await run.save_checkpoint()
        saved = (await run.forward(DATA)).metrics["loss:mean"]
        await run.forward_backward(DATA)
        await run.optim_step(learning_rate=1e-2)  # step 4 goes down with the group

        rank_process(service.process, 1).send_signal(signal.SIGKILL)
        # The client sends what got no answer again, until the group is back and says where the adapter stands.
        with pytest.raises(FailedPreconditionError) as refusal:
            async with asyncio.timeout(200):
                await run.forward_backward(DATA)
        assert refusal.value.reason == "ADAPTER_RESTORED"
        assert refusal.value.metadata["step"] == "3"

        again = await client.training_run("ada")
        assert again.adapter.step == 3
        assert (await again.forward(DATA)).metrics["loss:mean"] == pytest.approx(saved, rel=1e-6)
        await again.forward_backward(DATA)
        assert (await again.optim_step(learning_rate=1e-2)).step == 4
    ranks = [rank_process(service.process, rank) for rank in (0, 1)]
    service.process.terminate()
    await asyncio.to_thread(service.process.wait, 60)  # torchrun's own status after a signal is never 0
    assert psutil.wait_procs(ranks, timeout=5)[1] == []
