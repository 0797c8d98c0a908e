"""Processes that send parts of payloads to the samplers' lanes, side by side.

gRPC sends all streams of a Python process from one thread: 168 MB take 0.13 s to one sampler, and 0.37 s to four. With
a process for each stream they take 0.20 s to four (a trainer on four H200, 64 cores of a Xeon).
"""

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
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
_PARTS_PER_ROUTE = 2  # one is announced while the other one is sent
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
    """A relay, and the lane at HOST:PORT that it sends to."""

    relay: Relay
    host: str
    port: int


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
        routes = [_Route(next(self._relays), host, port) for port in ports[: self._routes_per_sampler]]
        free: asyncio.Queue[_Route] = asyncio.Queue()
        for route in routes * _PARTS_PER_ROUTE:
            free.put_nowait(route)
        sending = [asyncio.create_task(self._send_part(part, buffer.path, free)) for part in self._parts]
        sent = 0
        try:
            for task in sending:
                part = await task
                await push.add_part(part)
                sent = part.offset + part.size_bytes
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

    async def _send_part(self, part: _Part, path: str, free: "asyncio.Queue[_Route]") -> sampler_pb2.PushPart:
        """Sends a part, of the memory at `path`, in a call that stays open. Parts get a route in their order."""
        route = await free.get()
        try:
            await asyncio.shield(part.copying)
            part_id = await self._sent(part, path, route)
        finally:
            free.put_nowait(route)
        return sampler_pb2.PushPart(
            offset=part.start, size_bytes=part.end - part.start, lane_port=route.port, part_id=part_id
        )

    async def _sent(self, part: _Part, path: str, route: _Route) -> int:
        """The part's id, once the lane has it."""
        method: Any = route.relay.channel.unary_stream(relay.METHOD)  # its stub asks for serializers
        metadata = ((relay.LANE_KEY, f"{route.host}:{route.port}"), (relay.PAYLOAD_KEY, path))
        call = method(relay.RANGE.pack(part.start, part.end), timeout=PUSH_SECONDS, metadata=metadata)
        self._calls.append(call)
        try:
            async with asyncio.timeout(_ACCEPT_SECONDS):
                await call.read()
        except TimeoutError:
            self._unreachable.add((route.host, route.port))
            raise
        (part_id,) = relay.PART_ID.unpack(await call.read())
        return part_id


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
