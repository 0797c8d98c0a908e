"""A version on its way in: announced, received, proven, ready on every rank, live; or gone without a trace."""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import structlog

from sampler_service.lanes import Lanes
from sampler_service.versions import Registry, Version
from service_common import errors, failpoints
from service_common.checkpoint import Checkpoint
from service_common.lora import check_adapter_id, check_manifest, normalized
from service_common.staging import StagingPool
from tinkerbell import payload
from tinkerbell.payload import Chunk
from tinkerbell.v1 import common_pb2, sampler_pb2

log = structlog.get_logger(__name__)

# Brings a version into every worker, or into none: from its buffer, or from GPU memory with this id.
Install = Callable[[Version, str], Coroutine[Any, Any, None]]
# Frees a version that is in the workers.
Drop = Callable[[Version], None]


@dataclass(frozen=True)
class AlreadyLive:
    """The answer to a push of bytes that this sampler has."""

    version: Version


class Pushes:
    """Opens pushes, one at a time per adapter.

    staging: where payloads gather. lanes: what takes parts of them.
    """

    def __init__(
        self, checkpoint: Checkpoint, max_rank: int, registry: Registry, install: Install, drop: Drop, lanes: Lanes
    ):
        """`checkpoint`: the base model; `max_rank`: the largest rank that a push may have."""
        self._checkpoint = checkpoint
        self._max_rank = max_rank
        self._registry = registry
        self._install = install
        self._drop = drop
        self.staging = StagingPool()
        self.lanes = lanes
        self._open: set[str] = set()
        self._checked = functools.lru_cache(maxsize=64)(self._check)  # every push of an adapter has the same layout

    def begin(
        self, adapter_id: str, version: int, manifest: common_pb2.AdapterManifest, memory_id: str = ""
    ) -> "Push | AlreadyLive":
        """Checks what is announced and reserves the adapter. The caller must `close` the push.

        `memory_id`: of the GPU memory that has the payload; without one it comes in chunks.

        INVALID_ARGUMENT or FAILED_PRECONDITION when the base model cannot carry the adapter, ALREADY_EXISTS when
        the version is not above the latest one, ABORTED while another push of the adapter is open.
        """
        check_adapter_id(adapter_id)
        if version < 1:
            raise errors.invalid_argument("VERSION_INVALID", "versions count from 1", field="version", version=version)
        config, layout = self._checked(payload.layout(manifest))
        if live := self._already_live(adapter_id, version, manifest.digest):
            return AlreadyLive(live)
        if adapter_id in self._open:
            raise errors.aborted(
                "PUSH_IN_PROGRESS",
                f"another push of adapter {adapter_id!r} is in progress; push again when it has ended",
                adapter_id=adapter_id,
            )
        announced = Version(
            adapter_id=adapter_id,
            version=version,
            manifest=manifest,
            payload=self.staging.take(manifest.size_bytes),
            lora=config,
            layout=layout,
        )
        push = Push(
            announced,
            memory_id,
            self._registry,
            self._install,
            self._drop,
            self.lanes,
            lambda: self._open.remove(adapter_id),
        )
        self._open.add(adapter_id)
        if memory_id:
            push.start()  # all is there; the workers have it by the time that the caller asks for it
        return push

    def _check(self, layout: bytes) -> tuple[common_pb2.LoraConfig, bytes]:
        """What is announced, the adapter's shape with every field set."""
        manifest = common_pb2.AdapterManifest.FromString(layout)
        check_manifest(manifest, self._checkpoint, self._max_rank)
        manifest.lora.CopyFrom(normalized(manifest.lora, self._max_rank))
        return manifest.lora, payload.layout(manifest)

    def _already_live(self, adapter_id: str, version: int, digest: str) -> Version | None:
        latest = self._registry.latest(adapter_id)
        if latest is None:
            return None
        same_number = self._registry.find(adapter_id, version)
        for live in (same_number, latest):
            if live is not None and live.digest == digest:
                return live
        if version <= latest.version:
            raise errors.already_exists(
                "VERSION_EXISTS",
                f"version {version} of adapter {adapter_id!r} is not above the latest one, {latest.version}, and has "
                f"another digest; push it as version {latest.version + 1} or higher",
                adapter_id=adapter_id,
                version=version,
                latest_version=latest.version,
            )
        return None


class Push:
    """One push that was accepted. Only `commit` makes anything live."""

    def __init__(
        self,
        version: Version,
        memory_id: str,
        registry: Registry,
        install: Install,
        drop: Drop,
        lanes: Lanes,
        release: Callable[[], None],
    ):
        """`release` is called once, when the push is over."""
        self._version = version
        self._memory_id = memory_id
        self._registry = registry
        self._install = install
        self._drop = drop
        self._lanes = lanes
        self._release = release
        self._receiver = None if memory_id else payload.Receiver(version.manifest, version.payload.view)
        self._reading: list[asyncio.Task[None]] = []  # of parts, from the lanes that have them
        self._installing: asyncio.Task[None] | None = None
        self._committing: asyncio.Task[None] | None = None

    def add(self, chunk: Chunk) -> None:
        """Takes the next piece. DATA_LOSS when it is out of order or too much, INVALID_ARGUMENT when none is due."""
        with self._blamed_on_the_payload():
            self._expecting().add(chunk)

    def add_part(self, part: sampler_pb2.PushPart) -> None:
        """Takes the next piece from a lane. Errors as `add`, and when the payload is proven."""
        with self._blamed_on_the_payload():
            target = self._expecting().room(part.offset, part.size_bytes)
        self._reading.append(asyncio.create_task(asyncio.to_thread(self._lanes.read, part, target)))

    def start(self) -> asyncio.Task[None]:
        """Begins to bring the payload, all of which has come, into every rank; what `prepare` and `commit` wait for."""
        if self._installing is None:
            self._installing = asyncio.create_task(self._prove_and_install())
        return self._installing

    async def prepare(self) -> Version:
        """Brings the version into every rank without making it live.

        DATA_LOSS when the payload is not what was announced, INVALID_ARGUMENT when its numbers are not finite.
        """
        await asyncio.shield(self.start())
        return self._version

    async def commit(self) -> Version:
        """Makes the version live, having prepared it if nobody has.

        Once begun it runs to its end, even if the caller is cancelled: a half-installed version helps nobody, and a
        caller that never heard the answer finds the digest live when it pushes again.
        """
        self._committing = asyncio.create_task(self._publish_after(self.start()))
        await asyncio.shield(self._committing)
        return self._version

    def close(self) -> None:
        """Ends the push, however it went; without `commit` nothing of it stays."""
        last = self._committing or self._installing
        if last is not None:
            _when_done(last, self._settle)
        elif self._reading:
            _when_done(asyncio.gather(*self._reading, return_exceptions=True), self._abandon)
        else:
            self._abandon()

    async def _prove_and_install(self) -> None:
        # All of them, also when one fails: they write to memory that is free after that.
        read = await asyncio.gather(*self._reading, return_exceptions=True)
        if self._receiver:
            with self._blamed_on_the_payload():
                for failure in filter(None, read):
                    raise failure
                await asyncio.to_thread(self._receiver.finish)
        await self._install(self._version, self._memory_id)

    async def _publish_after(self, installing: asyncio.Task[None]) -> None:
        await installing
        await failpoints.reached("push.committing")
        self._registry.publish(self._version)
        log.info(
            "version_live",
            adapter_id=self._version.adapter_id,
            version=self._version.version,
            digest=self._version.digest,
            size_bytes=self._version.payload.size_bytes,
        )

    def _settle(self, last: asyncio.Task[None]) -> None:
        """Frees what nobody has any more, when the last thing that was begun has ended."""
        if last.cancelled() or (error := last.exception()):
            if not last.cancelled():
                log.info("push_failed", adapter_id=self._version.adapter_id, error=str(error))
            self._version.payload.close()
        elif last is not self._committing:
            self._drop(self._version)
        self._release()

    def _abandon(self, _: object = None) -> None:
        """The same when nothing was begun."""
        self._version.payload.close()
        self._release()

    def _expecting(self) -> payload.Receiver:
        if self._receiver is None:
            raise errors.invalid_argument(
                "FRAME_UNEXPECTED", "the push announced a payload in GPU memory, and sends another one", field="frame"
            )
        return self._receiver

    @contextlib.contextmanager
    def _blamed_on_the_payload(self) -> Iterator[None]:
        try:
            yield
        except payload.PayloadError as cause:
            raise errors.data_loss(
                "PAYLOAD_DAMAGED",
                f"{cause}; nothing was installed, push again",
                adapter_id=self._version.adapter_id,
                version=self._version.version,
            ) from cause


def _when_done(work: "asyncio.Future[Any]", callback: Callable[[Any], None]) -> None:
    """At once if it is done."""
    if work.done():
        callback(work)
    else:
        work.add_done_callback(callback)
