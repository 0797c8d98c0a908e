import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from client_fakes import WEIGHTS, Fakes
from typer.testing import CliRunner

from tinkerbell import SamplerClient, TrainerClient
from tinkerbell.cli.commands import app
from tinkerbell.local import LocalServices, ServiceDiedError, free_address

# A service with nothing behind its health. It starts a child of its own and ends on SIGTERM unless it is stubborn.
SERVICE = """
import asyncio, os, signal, subprocess, sys
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

async def main():
    print("arguments", *sys.argv[1:], flush=True)
    if "broken" in sys.argv:
        sys.exit("no such model")
    stubborn = "stubborn" in sys.argv
    child = subprocess.Popen(["sleep", "1000"])
    print("child", child.pid, flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, (lambda: None) if stubborn else stop.set)
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(sys.argv[sys.argv.index("--listen") + 1])
    await servicer.set(NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
    await server.start()
    await asyncio.sleep(0.6)
    await servicer.set(NAME, health_pb2.HealthCheckResponse.SERVING)
    await stop.wait()
    print("stopped cleanly", flush=True)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def fakes():
    with Fakes().running() as running:
        yield running


@pytest.fixture
def service_modules(tmp_path, monkeypatch):
    """Stand-ins for trainer_service and sampler_service, first in every child's path."""
    for module, name in (("trainer_service", "TrainerService"), ("sampler_service", "SamplerService")):
        source = SERVICE.replace("NAME", repr(f"tinkerbell.v1.{name}"))
        (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def local_services(model: str, log_dir: Path) -> LocalServices:
    return LocalServices.for_model(
        model, trainer_listen=free_address(), sampler_listen=free_address(), dtype="float32", log_dir=log_dir
    )


def children_of(logs: Path) -> list[int]:
    return [int(line.split()[1]) for log in logs.iterdir() for line in log.read_text().splitlines() if "child" in line]


def gone(pids: list[int]) -> bool:
    """Whether none of the processes is left, which after SIGKILL takes a moment."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.01)
    return False


def test_services_start_become_ready_and_stop(service_modules):
    logs = service_modules / "logs"
    services = local_services("tiny", logs)
    states = []
    try:
        services.start()
        services.wait_ready(timeout=30, on_change=lambda spec, state: states.append((spec.name, state)))
        services.check_alive()
    finally:
        services.stop()
    for name in ("trainer", "sampler"):
        seen = [state for service, state in states if service == name]
        assert seen[-1] == "ready"
        assert "loading" in seen
    trainer_log = (logs / "trainer.log").read_text()
    trainer, sampler = services.specs[1].address, services.specs[0].address
    assert f"arguments --model tiny --listen {trainer} --sampler {sampler}\n" in trainer_log
    assert "stopped cleanly" in trainer_log
    assert "stopped cleanly" in (logs / "sampler.log").read_text()
    children = children_of(logs)
    assert len(children) == 2
    assert gone(children)


def test_service_that_dies_while_starting_is_reported_with_its_log(service_modules):
    began = time.monotonic()
    with pytest.raises(ServiceDiedError, match=r"exited with status 1(?s:.*)no such model"):
        local_services("broken", service_modules / "logs").__enter__()
    assert time.monotonic() - began < 15


@pytest.mark.slow
def test_stubborn_services_are_killed_after_the_grace(service_modules):
    logs = service_modules / "logs"
    services = local_services("stubborn", logs)
    services.start()
    services.wait_ready(timeout=30)
    services.stop(grace_seconds=0.2)
    assert gone(children_of(logs))


@pytest.mark.slow
def test_services_that_are_never_ready_time_out(service_modules):
    (service_modules / "sampler_service.py").write_text("import time; time.sleep(100)")
    services = local_services("tiny", service_modules / "logs")
    try:
        services.start()
        with pytest.raises(TimeoutError, match=r"sampler .*not ready after 2 s"):
            services.wait_ready(timeout=2)
    finally:
        services.stop()


def test_taken_address_is_noticed_before_anything_starts(fakes, service_modules):
    services = LocalServices.for_model("tiny", trainer_listen=fakes.trainer_address, sampler_listen=free_address())
    with pytest.raises(OSError, match=f"{fakes.trainer_address} is taken"):
        services.start()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_shows_where_to_go_and_stops_cleanly(service_modules, number):
    trainer, sampler, logs = free_address(), free_address(), service_modules / "logs"
    listen = ["--trainer-listen", trainer, "--sampler-listen", sampler, "--log-dir", str(logs)]
    command = [sys.executable, "-c", "from tinkerbell.cli import main; main()", "up", "tiny", *listen]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = ""
    while "Ctrl-C" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    os.kill(process.pid, number)
    output += process.communicate(timeout=15)[0]
    assert process.returncode == 0, output
    assert f'TrainerClient("{trainer}")' in output.replace("\n", "")
    assert gone(children_of(logs))
    assert "stopped cleanly" in (logs / "trainer.log").read_text()


def test_up_fails_with_the_log_of_the_service_that_died(service_modules):
    command = ["up", "broken", "--trainer-listen", free_address(), "--sampler-listen", free_address()]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(app, command)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert result.exit_code == 1
    assert "no such model" in result.output


def test_info(fakes):
    result = CliRunner().invoke(app, ["info", "--trainer", fakes.trainer_address, "--sampler", fakes.sampler_address])
    assert result.exit_code == 0, result.output
    parallelism = "8 = tensor 2 * pipeline 2 * data 2"
    for shown in ("trainer", "sampler", "LlamaForCausalLM", "bfloat16", "vllm 0.26.0", "torch 2.11.0", parallelism):
        assert shown in result.output


def test_info_says_who_is_unreachable(fakes):
    nobody = free_address()
    result = CliRunner().invoke(app, ["info", "--trainer", fakes.trainer_address, "--sampler", nobody])
    assert result.exit_code == 1
    assert "LlamaForCausalLM" in result.output
    assert f"the sampler at {nobody}" in result.output


def test_adapters_joins_both_views(fakes):
    with TrainerClient(fakes.trainer_address) as trainer, SamplerClient(fakes.sampler_address) as sampler:
        trainer.create_lora_adapter("trained-only", rank=4, alpha=8)
        trainer.create_lora_adapter("both", rank=8, alpha=16)
        sampler.push_adapter("both", 5, WEIGHTS, rank=8, alpha=16)
        sampler.push_adapter("sampled-only", 2, WEIGHTS, rank=8, alpha=32)
    addresses = ["--trainer", fakes.trainer_address, "--sampler", fakes.sampler_address]
    result = CliRunner().invoke(app, ["adapters", *addresses])
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert rows == [
        ["trained-only", "4", "8", "0", "", "", ""],
        ["both", "8", "16", "0", "", "5", "0"],
        ["sampled-only", "8", "32", "", "", "2", "0"],
    ]


def test_checkpoints_of_one_adapter_or_of_all(fakes):
    with TrainerClient(fakes.trainer_address) as trainer:
        for adapter_id in ("saved-a", "saved-b"):
            trainer.create_lora_adapter(adapter_id).save_checkpoint(ttl_seconds=86400).result()
    address = ["--trainer", fakes.trainer_address]
    rows = [CliRunner().invoke(app, ["checkpoints", *chosen, *address]).output for chosen in ([], ["saved-b"])]
    saved, expires = (f"{datetime.datetime.fromtimestamp(1.5e9 + later):%Y-%m-%d %H:%M}" for later in (0, 86400))
    for adapter_id, shown in (("saved-a", rows[:1]), ("saved-b", rows)):
        for output in shown:
            line = next(line for line in output.splitlines() if adapter_id in line)
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            assert cells == [f"{adapter_id}/step-3", "8", "3", "2.5 MB", saved, expires]
    assert "saved-a" not in rows[1]


def test_sample_streams_the_text(fakes):
    address = ["--sampler", fakes.sampler_address]
    result = CliRunner().invoke(
        app, ["sample", "tell me more", "--raw", "--adapter", "alice", "--version", "4", *address]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "tell me more \n"
    assert "alice version 4, abc" in result.stderr
    request = fakes.sampler.generate_requests[-1]
    assert (request.text, request.sampling.max_tokens) == ("tell me more", 256)
    CliRunner().invoke(app, ["sample", "hi", *address])
    assert fakes.sampler.generate_requests[-1].chat.messages[0].content == "hi"
