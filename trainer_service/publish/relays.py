"""Processes that send parts of payloads to the samplers' lanes, side by side.

gRPC sends all streams of a Python process from one thread: 168 MB take 0.13 s to one sampler, and 0.37 s to four. With
a process for each stream they take 0.20 s to four (a trainer on four H200, 64 cores of a Xeon).
"""

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import structlog

from service_common.children import Child, Children, suitable
from service_common.staging import StagingBuffer, StagingPool
from tinkerbell.push import PushStream
from tinkerbell.v1 import sampler_pb2
from trainer_service.publish import relay
from trainer_service.publish.channels import PUSH_SECONDS
from trainer_service.snapshot import Snapshot

log = structlog.get_logger(__name__)

_LEAST_BYTES = 16 << 20  # what one process sends in the time that the detour takes
_PART_BYTES = 8 << 20
# A lane that a firewall hides does not answer. The payload then goes with the push itself.
_ACCEPT_SECONDS = 2.0
_MOST = 8


class Relay(Child):
    """One of them."""

    def __init__(self, socket: Path):
        super().__init__(relay.__name__, f"unix:{socket}")
        self._channels: list[grpc.aio.Channel] = []

    @property
    def channel(self) -> grpc.aio.Channel:
        """To the process that runs now."""
        return self._channels[-1]

    async def start(self) -> None:
        """As Child's."""
        await super().start()
        # It knows nothing of the process before it, as a pool of connections would. That one's channel stays: to close
        # it would cancel the pushes that have not heard yet that the process is gone.
        self._channels.append(grpc.aio.insecure_channel(self.listen, [("grpc.use_local_subchannel_pool", 1)]))

    async def close(self) -> None:
        """As Child's."""
        for channel in self._channels:
            await channel.close()
        await super().close()


class _Part(NamedTuple):
    """Of a payload, from byte `start` to `end`; in shared memory when `copying` has ended."""

    start: int
    end: int
    copying: asyncio.Task[None]


class _Route(NamedTuple):
    """A lane at HOST:PORT, and the call of the relay that sends parts to it."""

    host: str
    port: int
    call: Any


class SharedPayload:
    """A payload that goes to memory that the relays read, and from there to samplers."""

    def __init__(
        self,
        snapshot: Snapshot,
        staging: StagingPool,
        relays: Iterator[Relay],
        routes_per_sampler: int,
        unreachable: set[tuple[str, int]],
    ):
        """`relays`: to take in turn, without end; `unreachable`: lanes, by host and port."""
        self._snapshot = snapshot
        self._staging = staging
        self._relays = relays
        self._routes_per_sampler = routes_per_sampler
        self._unreachable = unreachable
        self._buffer: StagingBuffer | None = None
        self._parts: list[_Part] = []
        self._calls: list[Any] = []

    async def send(self, host: str, push: PushStream) -> int:
        """Sends the payload of a push to lanes of a sampler's host, as far as that can be; the rest is the caller's.

        Returns where the rest starts. The sampler reads each part while the next ones are still on their way.
        """
        ports = [port for port in push.lane_ports if (host, port) not in self._unreachable]
        if not ports:
            return 0
        buffer = self._buffer or self._begin_to_copy()
        ports = ports[: min(self._routes_per_sampler, len(self._parts))]
        routes = [self._route(host, port, buffer.path) for port in ports]
        sending = [
            asyncio.create_task(_send(self._parts[index :: len(routes)], route)) for index, route in enumerate(routes)
        ]
        sent = 0
        try:
            await asyncio.gather(*(self._opened(route) for route in routes))
            for part, route in zip(self._parts, itertools.cycle(routes), strict=False):
                await asyncio.shield(part.copying)
                (part_id,) = relay.PART_ID.unpack(await route.call.read())
                size = part.end - part.start
                await push.add_part(
                    sampler_pb2.PushPart(offset=part.start, size_bytes=size, lane_port=route.port, part_id=part_id)
                )
                sent = part.end
        except (grpc.aio.AioRpcError, TimeoutError) as failure:
            reason = failure.details() if isinstance(failure, grpc.aio.AioRpcError) else repr(failure)
            log.warning("lanes_failed", host=host, ports=ports, sent_bytes=sent, error=reason)
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
        return sent

    def close(self) -> None:
        """Frees the memory, here once nothing is copied any more: what has begun goes on when nobody wants it."""
        for call in self._calls:
            call.cancel()
        if buffer := self._buffer:
            copying = asyncio.gather(*(part.copying for part in self._parts), return_exceptions=True)
            copying.add_done_callback(lambda _: buffer.close())

    def _begin_to_copy(self) -> StagingBuffer:
        size = self._snapshot.manifest.size_bytes
        buffer = self._buffer = self._staging.take(size)
        for start in range(0, size, _PART_BYTES):
            end = min(start + _PART_BYTES, size)
            copying = asyncio.create_task(asyncio.to_thread(_copy, self._snapshot, buffer.view, start, end))
            self._parts.append(_Part(start, end, copying))
        return buffer

    def _route(self, host: str, port: int, path: str) -> _Route:
        """To a lane, from the next relay, which reads the memory at `path`. Its call stays open."""
        method: Any = next(self._relays).channel.stream_stream(relay.METHOD)  # its stub asks for serializers
        metadata = ((relay.LANE_KEY, f"{host}:{port}"), (relay.PAYLOAD_KEY, path))
        call = method(timeout=PUSH_SECONDS, metadata=metadata)
        self._calls.append(call)
        return _Route(host, port, call)

    async def _opened(self, route: _Route) -> None:
        try:
            async with asyncio.timeout(_ACCEPT_SECONDS):
                await route.call.initial_metadata()
        except TimeoutError:
            self._unreachable.add((route.host, route.port))
            raise


class Relays(Children[Relay]):
    """Those of one trainer."""

    def __init__(self, count: int | None = None, least_bytes: int = _LEAST_BYTES):
        """They start when they are first wanted. `count`: None for what suits the cores. `least_bytes`: of a payload
        that is worth it.
        """
        if count is None:
            count = suitable(_MOST)
        # No other user may have a relay read files.
        self._folder = tempfile.TemporaryDirectory(prefix="tinkerbell-relays-")
        super().__init__([Relay(Path(self._folder.name, str(index))) for index in range(count)])
        self._least_bytes = least_bytes
        self._staging = StagingPool()
        self._unreachable: set[tuple[str, int]] = set()

    @contextlib.asynccontextmanager
    async def shared(self, snapshot: Snapshot, num_samplers: int) -> AsyncIterator[SharedPayload | None]:
        """The snapshot's payload for so many samplers, until the block ends; None where one process does as well."""
        is_large = snapshot.manifest.size_bytes >= self._least_bytes
        relays = self.running() if num_samplers and is_large else []
        if len(relays) < 2:
            yield None
            return
        routes_per_sampler = max(1, len(relays) // num_samplers)
        payload = SharedPayload(snapshot, self._staging, itertools.cycle(relays), routes_per_sampler, self._unreachable)
        try:
            yield payload
        finally:
            payload.close()

    async def close(self) -> None:
        """Ends all."""
        await super().close()
        self._folder.cleanup()


def _copy(snapshot: Snapshot, shared: memoryview, start: int, end: int) -> None:
    """Once the payload has arrived from a GPU. Parts are copied side by side, and NumPy starts no threads for each."""
    np.copyto(np.frombuffer(shared, np.uint8)[start:end], np.frombuffer(snapshot.payload, np.uint8)[start:end])


async def _send(parts: Sequence[_Part], route: _Route) -> None:
    """Has parts sent, each as soon as it is there."""
    for part in parts:
        await asyncio.shield(part.copying)
        await route.call.write(relay.RANGE.pack(part.start, part.end))
