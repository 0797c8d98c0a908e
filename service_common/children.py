"""Processes that move bytes for a service over gRPC, beside it, and end with it.

A Python process takes or sends little more than a gigabyte a second by gRPC, whatever the number of its streams.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence

import grpc
import structlog

from service_common import logs
from service_common.allocator import keep_freed_memory
from service_common.rpc import MAX_MESSAGE_BYTES, ErrorInterceptor

log = structlog.get_logger(__name__)

_START_SECONDS = 30.0
_END_SECONDS = 5.0
# One of them moves bytes, while the others are left to the services on this host.
_CORES_PER_CHILD = 4
_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]


def suitable(most: int) -> int:
    """How many of a kind suit this host's cores."""
    return min(most, len(os.sched_getaffinity(0)) // _CORES_PER_CHILD)


async def serve(name: str, listen: str, add_service: Callable[[grpc.aio.Server], None]) -> None:
    """What such a process does: serves until its parent is gone.

    `name`: what its logs call it. `listen`: HOST:PORT or unix:PATH.
    """
    keep_freed_memory()
    logs.configure(name)  # to stderr: the parent reads one line of the standard output
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_OPTIONS)
    add_service(server)
    port = server.add_insecure_port(listen)
    await server.start()
    print(port, flush=True)
    await _end_of_input()
    await server.stop(0)


async def _end_of_input() -> None:
    """The parent has the other end of it, and the system closes that when the parent is gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


class Child:
    """One such process; as long as it runs, it has `pid` and `port`."""

    def __init__(self, module: str, listen: str):
        """`module`: runs `serve` when it is the main one, with `listen` as its argument."""
        self.module = module
        self.listen = listen
        self._process: asyncio.subprocess.Process | None = None
        self.pid = self.port = 0

    @property
    def is_running(self) -> bool:
        """Whether it serves."""
        return self.pid != 0 and self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts it, again if it is gone. OSError, TimeoutError or ValueError when it does not serve."""
        await self._end()
        # It has a session of its own, so that a signal from the terminal ends the service first.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self.module, self.listen),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(_START_SECONDS):
            self.port = int(await self._process.stdout.readline())
        self.pid = self._process.pid

    async def close(self) -> None:
        """Ends it, if it has been started."""
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        pid, self.pid = self.pid, 0
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        if pid:  # it serves, and so sees the end of its input
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Children[Kind: Child]:
    """Several of a kind. One that is gone is started again; one that does not start is given up: they only help."""

    def __init__(self, children: Sequence[Kind]):
        self._children = list(children)
        self._starting: dict[Kind, asyncio.Task[None]] = {}

    def running(self) -> list[Kind]:
        """Those that serve. The others begin to start."""
        for child in self._children:
            if not child.is_running and child not in self._starting:
                self._starting[child] = asyncio.create_task(self._start(child))
        return [child for child in self._children if child.is_running and child not in self._starting]

    async def started(self) -> None:
        """Starts all, and waits until they serve."""
        self.running()
        await asyncio.gather(*self._starting.values())

    async def close(self) -> None:
        """Ends all."""
        starting = list(self._starting.values())
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(child.close() for child in self._children))

    async def _start(self, child: Kind) -> None:
        try:
            await child.start()
            log.info("child_started", module=child.module, pid=child.pid)
        except Exception as failure:
            log.warning("child_given_up", module=child.module, error=repr(failure))
            self._children.remove(child)
            await child.close()
        finally:
            del self._starting[child]
