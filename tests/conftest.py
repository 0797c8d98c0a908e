"""Models and processes that several test files share. One sampler and one trainer serve the whole session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ServiceProcess, made_model, start_sampler, start_trainer, wait_ready


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return made_model("SmolLM2-135M-Instruct", "smollm2")


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return made_model("tiny-llama", "tiny", "llama")


@pytest.fixture(scope="session")
def sampler_process(smollm2: Path) -> Iterator[ServiceProcess]:
    """SmolLM2 in float32."""
    sampler = start_sampler(smollm2, "--dtype", "float32", "--max-model-len", "2048")
    try:
        yield wait_ready(sampler)
    finally:
        sampler.stop()


@pytest.fixture(scope="session")
def trainer_process(smollm2: Path, sampler_process: ServiceProcess) -> Iterator[ServiceProcess]:
    """SmolLM2 in float32, publishing to `sampler_process`."""
    trainer = start_trainer("--model", str(smollm2), "--sampler", sampler_process.address, "--device", "cpu")
    try:
        yield wait_ready(trainer)
    finally:
        trainer.stop()
