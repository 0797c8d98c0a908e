"""Services as processes, and the models they serve."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import device
import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service_common import failpoints
from tinkerbell.local import free_address

ROOT = Path(__file__).parents[1]
MODELS = ROOT / ".cache" / "models"
READY_SECONDS = 300

TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class ServiceProcess:
    """A service that listens at `address`."""

    health_name: str
    address: str
    process: subprocess.Popen

    def stop(self) -> None:
        """Drains it."""
        self.process.terminate()
        self.process.wait(60)


def made_model(name: str, *arguments: str) -> Path:
    """The model folder, made if it is not there yet."""
    folder = MODELS / name
    if not folder.is_dir():
        subprocess.run([sys.executable, ROOT / "scripts/make_models.py", *arguments, folder], check=True)
    return folder


def rank_environment() -> dict[str, str]:
    """For the programs that `TWO_RANKS` starts, which import this repository's packages and tests."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def two_gpu_ranks(module: str) -> list[str]:
    """The command of two ranks on a GPU each, or on the same one where there are no more. In `rank_environment`."""
    sharing = ["rank_programs.one_gpu"] if torch.cuda.device_count() == 1 else []
    return [*TWO_RANKS, "-m", *sharing, module]


def start_sampler(model: Path, *options: str, address: str | None = None, die_at: str = "") -> ServiceProcess:
    """Starts a sampler, on a free port unless told where, and does not wait for it. `die_at`: failpoints."""
    # Several share the GPU.
    share = ["--gpu-memory-utilization=0.1", "--kv-cache-gib=4"] if device.name == "cuda" else []
    return _start(
        "sampler_service",
        "tinkerbell.v1.SamplerService",
        f"--model={model}",
        *share,
        *options,
        address=address,
        die_at=die_at,
    )


def start_trainer(*options: str, address: str | None = None, die_at: str = "") -> ServiceProcess:
    """Starts a trainer, on a free port unless told where, and does not wait for it. `die_at`: failpoints."""
    return _start(
        "trainer_service",
        "tinkerbell.v1.TrainerService",
        f"--device={device.name}",
        *options,
        address=address,
        die_at=die_at,
    )


def _start(module: str, health_name: str, *options: str, address: str | None, die_at: str) -> ServiceProcess:
    address = address or free_address()
    command = [sys.executable, "-m", module, "--listen", address, *options]
    environment = os.environ | {failpoints.VARIABLE: die_at}
    return ServiceProcess(health_name, address, subprocess.Popen(command, cwd=ROOT, env=environment))


def health(service: ServiceProcess, name: str) -> health_pb2.HealthCheckResponse.ServingStatus | None:
    """What the service says of itself; None while it does not answer."""
    with grpc.insecure_channel(service.address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=name)
            return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status
        except grpc.RpcError:
            return None


def wait_ready(service: ServiceProcess) -> ServiceProcess:
    """Waits until the service says that it is ready."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert service.process.poll() is None, f"{service.health_name} ended before it was ready"
        if health(service, service.health_name) == health_pb2.HealthCheckResponse.SERVING:
            return service
        time.sleep(0.2)
    raise TimeoutError(f"{service.health_name} was not ready after {READY_SECONDS} s")
