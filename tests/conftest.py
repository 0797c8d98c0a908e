"""Models and processes that several test files share. One sampler and one trainer serve the whole session."""

import signal
from collections.abc import Iterator
from pathlib import Path

import device
import hypothesis
import kernels  # noqa: F401  (first of all that may import Triton)
import pytest
from processes import ServiceProcess, made_model, start_sampler, start_trainer, wait_ready

from tinkerbell.local import free_address

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long one example takes says how busy the machine is; pytest's own timeout finds what hangs.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tests' engines run")


def pytest_configure(config: pytest.Config) -> None:
    device.name = config.getoption("--device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if device.name == "cuda":
        for item in items:
            if item.get_closest_marker("cpu_only"):
                item.add_marker(pytest.mark.skip(reason="what it proves, it proves on a CPU"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return made_model("SmolLM2-135M-Instruct", "smollm2")


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return made_model("tiny-llama", "tiny", "llama")


@pytest.fixture(scope="session")
def http_address() -> str:
    """Where `sampler_process` serves OpenAI's API."""
    return free_address()


@pytest.fixture(scope="session")
def sampler_metrics_address() -> str:
    """Where `sampler_process` serves its metrics."""
    return free_address()


@pytest.fixture(scope="session")
def sampler_process(smollm2: Path, http_address: str, sampler_metrics_address: str) -> Iterator[ServiceProcess]:
    """SmolLM2."""
    sampler = start_sampler(
        smollm2,
        f"--dtype={device.dtype_name()}",
        "--max-model-len=2048",
        "--max-sequences=64",
        f"--http={http_address}",
        f"--metrics={sampler_metrics_address}",
    )
    try:
        yield wait_ready(sampler)
    finally:
        sampler.stop()


@pytest.fixture(scope="session")
def metrics_address() -> str:
    """Where `trainer_process` serves its metrics."""
    return free_address()


@pytest.fixture(scope="session")
def trainer_process(
    smollm2: Path,
    sampler_process: ServiceProcess,
    metrics_address: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServiceProcess]:
    """SmolLM2, publishing to `sampler_process`, with checkpoints and room for three adapters at a time."""
    trainer = start_trainer(
        f"--model={smollm2}",
        f"--sampler={sampler_process.address}",
        f"--checkpoints={tmp_path_factory.mktemp('checkpoints')}",
        f"--metrics={metrics_address}",
        "--max-resident-adapters=3",
    )
    try:
        yield wait_ready(trainer)
    finally:
        trainer.stop()
