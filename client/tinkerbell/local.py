"""A trainer and a sampler on this machine: start them, wait until they are healthy, stop them.

Waiting needs grpcio-health-checking, which `pip install tinkerbell[cli]` brings.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grpc

State = Literal["starting", "loading", "ready"]
"""starting: does not answer yet. loading: answers, but can't serve yet. ready: serves."""

_POLL_SECONDS = 0.1
_LOG_TAIL_LINES = 30
# A service that was not there a moment ago is worth asking again at once.
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class ServiceDiedError(RuntimeError):
    """A service ended by itself. The message holds its exit status and the tail of its log."""


@dataclass(frozen=True)
class ServiceSpec:
    """How to run one service."""

    name: str
    """For people and for the log's file name."""
    command: tuple[str, ...]
    """Program and arguments."""
    address: str
    """HOST:PORT on which it listens."""
    health_service: str
    """Its name in grpc.health.v1."""


class LocalServices:
    """Services as child processes; a context manager that starts them, waits, and stops them.

        with LocalServices.for_model("models/smollm2"):
            trainer = TrainerClient("127.0.0.1:50051")

    Each child leads a process group of its own, so a Ctrl-C at the terminal reaches this process alone, which then
    stops them in order; and what a child has started goes with it.
    """

    def __init__(self, specs: Sequence[ServiceSpec], log_dir: Path | None = None, verbose: bool = False):
        """`log_dir` gets NAME.log for each service; None means a new temporary folder.

        `verbose`: the services write to this process's output instead.
        """
        self.specs = tuple(specs)
        self.log_dir = None if verbose else log_dir or Path(tempfile.mkdtemp(prefix="tinkerbell-"))
        self._processes: dict[ServiceSpec, subprocess.Popen] = {}

    @classmethod
    def for_model(
        cls,
        model: str,
        *,
        trainer_listen: str = "127.0.0.1:50051",
        sampler_listen: str = "127.0.0.1:50052",
        dtype: str | None = None,
        log_dir: Path | None = None,
        verbose: bool = False,
    ) -> "LocalServices":
        """A trainer that publishes to a sampler, both with this model and this Python interpreter.

        `model`: a folder or a hub name. `dtype`: of the sampler's base weights, "float32" or "bfloat16"; None means its
        default.
        """
        trainer = (sys.executable, "-m", "trainer_service", "--model", model, "--listen", trainer_listen)
        sampler = (sys.executable, "-m", "sampler_service", "--model", model, "--listen", sampler_listen)
        precision = ("--dtype", dtype) if dtype else ()
        return cls(
            [
                ServiceSpec("sampler", (*sampler, *precision), sampler_listen, "tinkerbell.v1.SamplerService"),
                ServiceSpec(
                    "trainer",
                    (*trainer, "--sampler", sampler_listen),
                    trainer_listen,
                    "tinkerbell.v1.TrainerService",
                ),
            ],
            log_dir,
            verbose,
        )

    def __enter__(self) -> "LocalServices":
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the processes. OSError, before any of them runs, when an address is taken."""
        for spec in self.specs:
            _check_free(spec)
        for spec in self.specs:
            with contextlib.ExitStack() as stack:
                output = None
                if self.log_dir is not None:
                    self.log_dir.mkdir(parents=True, exist_ok=True)
                    output = stack.enter_context(self._log(spec).open("wb"))
                self._processes[spec] = subprocess.Popen(
                    spec.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if output else None,
                    start_new_session=True,
                )

    def wait_ready(
        self,
        timeout: float | None = None,
        on_change: Callable[[ServiceSpec, State], None] | None = None,
    ) -> None:
        """Returns when all services are ready. `on_change` hears of each service's states as they come.

        ServiceDiedError when one of them ends; TimeoutError after `timeout` seconds, None meaning never.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        states: dict[ServiceSpec, State] = {}
        with contextlib.ExitStack() as stack:
            channels = {
                spec: stack.enter_context(grpc.insecure_channel(spec.address, options=_CHANNEL_OPTIONS))
                for spec in self.specs
            }
            while True:
                self.check_alive()
                for spec, channel in channels.items():
                    state = _health(channel, spec.health_service)
                    if states.get(spec) != state:
                        states[spec] = state
                        if on_change:
                            on_change(spec, state)
                waiting = [spec.name for spec in self.specs if states[spec] != "ready"]
                if not waiting:
                    return
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"{' and '.join(waiting)} not ready after {timeout:g} s")
                time.sleep(_POLL_SECONDS)

    def check_alive(self) -> None:
        """ServiceDiedError when a service has ended."""
        for spec, process in self._processes.items():
            status = process.poll()
            if status is not None:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
                raise ServiceDiedError(f"the {spec.name} {how}{self._log_tail(spec)}")

    def wait(self) -> None:
        """Watches for as long as all services run: ServiceDiedError when one of them ends."""
        while True:
            self.check_alive()
            time.sleep(_POLL_SECONDS)

    def stop(self, grace_seconds: float = 20.0) -> None:
        """Asks all services to end (SIGTERM) and, after the grace, kills them and whatever they started.

        A second interrupt while this waits kills at once.
        """
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + grace_seconds
        try:
            for process in self._processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in self._processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._processes.clear()

    def _log(self, spec: ServiceSpec) -> Path:
        assert self.log_dir is not None
        return self.log_dir / f"{spec.name}.log"

    def _log_tail(self, spec: ServiceSpec) -> str:
        if self.log_dir is None:
            return ""
        lines = self._log(spec).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return f"; the end of {self._log(spec)}:\n" + "\n".join(lines)


def free_address(host: str = "127.0.0.1") -> str:
    """HOST:PORT of a port that nothing listens on at this moment."""
    with socket.create_server((host, 0)) as listener:
        return f"{host}:{listener.getsockname()[1]}"


def _check_free(spec: ServiceSpec) -> None:
    # Otherwise the health of whatever listens there would pass for the health of a child that could not listen.
    host, _, port = spec.address.rpartition(":")
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        raise OSError(f"{spec.address} is taken: something listens there already, so the {spec.name} can't")


def _health(channel: grpc.Channel, service: str) -> State:
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415 - comes with the cli extra

    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=1)
    except grpc.RpcError:
        return "starting"
    return "ready" if answer.status == health_pb2.HealthCheckResponse.SERVING else "loading"
