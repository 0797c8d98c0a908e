"""Samplers as processes."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
MODELS = ROOT / ".cache" / "models"
READY_SECONDS = 300

os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class SamplerProcess:
    """A sampler that serves `model` at `address`."""

    address: str
    process: subprocess.Popen
    model: Path
    start_seconds: float


def made_model(name: str, *arguments: str) -> Path:
    """The model folder, made if it is not there yet."""
    folder = MODELS / name
    subprocess.run([sys.executable, ROOT / "scripts/make_models.py", *arguments, folder], check=True)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_sampler(model: Path, *options: str) -> SamplerProcess:
    """Starts a sampler and does not wait for it."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "sampler_service", "--model", model, "--listen", address, *options]
    return SamplerProcess(address, subprocess.Popen(command, cwd=ROOT), model, 0.0)


def wait_ready(sampler: SamplerProcess) -> SamplerProcess:
    """Waits until the sampler says that it is ready."""
    start = time.monotonic()
    with grpc.insecure_channel(sampler.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="tinkerbell.v1.SamplerService")
        while time.monotonic() < start + READY_SECONDS:
            assert sampler.process.poll() is None, "the sampler ended before it was ready"
            try:
                if health.Check(request, timeout=5).status == health_pb2.HealthCheckResponse.SERVING:
                    return SamplerProcess(
                        sampler.address, sampler.process, sampler.model, start_seconds=time.monotonic() - start
                    )
            except grpc.RpcError:
                pass
            time.sleep(0.2)
    raise TimeoutError(f"the sampler was not ready after {READY_SECONDS} s")
