"""Processes that send one payload to several samplers at once.

gRPC sends all streams of a Python process from one thread: 168 MB take 0.13 s to one sampler, and 0.37 s to four. With
a process for each stream they take 0.20 s to four (a trainer on four H200, 64 cores of a Xeon).
"""

import asyncio
import contextlib
import itertools
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import structlog

from service_common.staging import StagingBuffer, StagingPool
from tinkerbell.push import PushStream
from trainer_service.publish import relay
from trainer_service.publish.channels import PUSH_SECONDS
from trainer_service.snapshot import Snapshot

log = structlog.get_logger(__name__)

_LEAST_BYTES = 16 << 20  # what one process sends in the time that the detour takes
_PIECE_BYTES = 8 << 20  # a relay sends one while others are still being copied
_START_SECONDS = 30.0


class _Piece(NamedTuple):
    """Of a payload, from byte `start` to `end` or the payload's; in shared memory when `copying` has ended."""

    start: int
    end: int
    copying: asyncio.Task[None]


class RelayedPush(PushStream):
    """A push by way of another process, which finds the payload in shared memory."""

    METHOD = relay.METHOD

    def __init__(self, channel: grpc.aio.Channel, sampler: str, path: str, pieces: Sequence[_Piece]):
        """`channel`: to the relay; `sampler`: HOST:PORT; `path`: of the memory that gets the payload's pieces."""
        super().__init__(channel, PUSH_SECONDS, ((relay.SAMPLER_KEY, sampler), (relay.PAYLOAD_KEY, path)))
        self._pieces = pieces

    async def send(self, payload: bytes | memoryview) -> None:
        """Has the payload sent that is in shared memory, each piece as soon as it is there."""
        for start, end, copying in self._pieces:
            await asyncio.shield(copying)
            if not await self._write(relay.PIECE.pack(start, end)):
                return  # the sampler has ended the call; the next step hears why


class SharedPayload:
    """A payload on its way to memory that the relays read."""

    def __init__(self, snapshot: Snapshot, buffer: StagingBuffer, relays: Iterator[grpc.aio.Channel]):
        """Begins to copy it. `buffer`: of its size; `relays`: to take in turn, without end."""
        self._buffer = buffer
        self._relays = relays
        self._pieces = [self._piece(snapshot, start) for start in range(0, buffer.size_bytes, _PIECE_BYTES)]

    def push(self, sampler: str) -> PushStream:
        """A new push to a sampler's HOST:PORT, for a transaction; close it in the end."""
        return RelayedPush(next(self._relays), sampler, self._buffer.path, self._pieces)

    def close(self) -> None:
        """Frees the memory, once nothing is copied any more: what has begun goes on when nobody wants it."""
        copying = asyncio.gather(*(piece.copying for piece in self._pieces), return_exceptions=True)
        copying.add_done_callback(lambda _: self._buffer.close())

    def _piece(self, snapshot: Snapshot, start: int) -> _Piece:
        end = start + _PIECE_BYTES
        copying = asyncio.to_thread(_copy, snapshot, self._buffer.view, start, end)
        return _Piece(start, end, asyncio.create_task(copying))


class Relays:
    """Starts them when they are first wanted, and again those that are gone."""

    def __init__(self, most: int, least_bytes: int = _LEAST_BYTES):
        """`most`: processes, one for each sampler up to that many; `least_bytes`: of a payload that is worth it."""
        self._relays = [_Relay() for _ in range(most)]
        self._least_bytes = least_bytes
        self._buffers = StagingPool()
        self._starting = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def shared(self, snapshot: Snapshot, num_samplers: int) -> AsyncIterator[SharedPayload | None]:
        """The snapshot's payload for so many samplers, until the block ends; None where one process does as well.

        It is copied while the samplers answer BEGIN, and while what has been copied is sent.
        """
        size = snapshot.manifest.size_bytes
        running = await self._running(num_samplers) if size >= self._least_bytes else []
        if not running:
            yield None
            return
        payload = SharedPayload(snapshot, self._buffers.take(size), itertools.cycle(running))
        try:
            yield payload
        finally:
            payload.close()

    async def _running(self, num_samplers: int) -> list[grpc.aio.Channel]:
        """None from the first time on that they do not start: pushes need them only to be quick."""
        relays = self._relays[:num_samplers]
        if len(relays) < 2:
            return []
        async with self._starting:
            started = await asyncio.gather(*(each.running() for each in relays), return_exceptions=True)
        channels = [each for each in started if not isinstance(each, BaseException)]
        if len(channels) < len(started):
            failure = next(each for each in started if isinstance(each, BaseException))
            log.warning("relays_given_up", error=repr(failure))
            await self.close()
            self._relays = []
            return []
        return channels

    async def close(self) -> None:
        """Ends the processes."""
        await asyncio.gather(*(each.close() for each in self._relays))


class _Relay:
    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._resources = contextlib.AsyncExitStack()
        self._channel: grpc.aio.Channel | None = None

    async def running(self) -> grpc.aio.Channel:
        """To the process, which is started if there is none. TimeoutError when it does not get ready."""
        if self._channel is None or self._process is None or self._process.returncode is not None:
            await self.close()
            folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="tinkerbell-relay-"))
            socket = f"unix:{Path(folder, 'socket')}"
            # It has a session of its own, so that a signal from the terminal ends the trainer first.
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", relay.__name__, socket), stdin=asyncio.subprocess.PIPE, start_new_session=True
            )
            self._resources.push_async_callback(_end, self._process)
            channel = await self._resources.enter_async_context(grpc.aio.insecure_channel(socket))
            async with asyncio.timeout(_START_SECONDS):
                await channel.channel_ready()
            self._channel = channel
            log.info("relay_started", pid=self._process.pid)
        return self._channel

    async def close(self) -> None:
        """Ends the process, if there is one."""
        self._channel = None
        await self._resources.aclose()


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


def _copy(snapshot: Snapshot, shared: memoryview, start: int, end: int) -> None:
    """Once the payload has arrived from a GPU. Pieces are copied side by side, and NumPy starts no threads for each."""
    np.copyto(np.frombuffer(shared, np.uint8)[start:end], np.frombuffer(snapshot.payload, np.uint8)[start:end])
