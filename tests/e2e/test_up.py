"""`tinkerbell up` on real engines, as a user runs it: with a bfloat16 sampler, and on the GPU where there is one.

Trainer and sampler score the same tokens alike: mean absolute difference at most 0.05 in bfloat16.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import transformers
from processes import READY_SECONDS, ROOT, ServiceProcess, health, wait_ready

from tinkerbell import Datum, SamplerClient, TrainerClient
from tinkerbell.local import free_address

pytestmark = pytest.mark.engine

TOLERANCE = 0.05
TEXT = "The secret word is marmalade, and nobody at the harbour knew why it was painted on every boat."


@pytest.fixture
def up(smollm2: Path, tmp_path: Path):
    """The command, the trainer and the sampler that it started."""
    addresses = {"trainer": free_address(), "sampler": free_address()}
    listen = [f"--{name}-listen={address}" for name, address in addresses.items()]
    command = [sys.executable, "-c", "from tinkerbell.cli import main; main()", "up", str(smollm2), *listen]
    options = ["--dtype=bfloat16", f"--log-dir={tmp_path}"]
    process = subprocess.Popen([*command, *options], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    try:
        yield [
            wait_ready(ServiceProcess(f"tinkerbell.v1.{name.title()}Service", address, process))
            for name, address in addresses.items()
        ]
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(2 * READY_SECONDS)
def test_up_trains_and_samples_alike_and_ctrl_c_leaves_nothing_behind(up, smollm2: Path, tmp_path: Path) -> None:
    trainer_process, sampler_process = up
    tokens = transformers.AutoTokenizer.from_pretrained(smollm2)(TEXT).input_ids
    datum = Datum(tokens[:-1], tokens[1:])
    with TrainerClient(trainer_process.address) as trainer, SamplerClient(sampler_process.address) as sampler:
        assert sampler.get_backend_info().base_model.dtype == "bfloat16"
        run = trainer.create_lora_adapter("alice", rank=8)
        for _ in range(5):
            run.forward_backward([datum])
            run.optim_step(learning_rate=1e-3)
        run.sync_adapter_to_vllm().result()
        trained = run.forward([datum]).result().logprobs[0]
        sampled = sampler.compute_logprobs([tokens], adapter_id="alice").result().logprobs[0]
        of_base = sampler.compute_logprobs([tokens]).result().logprobs[0]
    assert np.abs(trained - sampled).mean() <= TOLERANCE
    assert np.abs(trained - of_base).mean() > 10 * TOLERANCE

    descendants = psutil.Process(trainer_process.process.pid).children(recursive=True)
    assert len(descendants) >= 2
    trainer_process.process.send_signal(signal.SIGINT)
    output, _ = trainer_process.process.communicate(timeout=60)
    assert trainer_process.process.returncode == 0
    assert "stopping" in output
    assert not psutil.wait_procs(descendants, timeout=5)[1]
    for service in up:
        assert health(service, "") is None
    for name in ("trainer", "sampler"):
        assert '"stopped"' in (tmp_path / f"{name}.log").read_text()
