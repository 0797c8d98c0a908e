"""The trainer as its clients see it: adapters, operations in order, publishing."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from service_common import checkpoint as checkpoints
from service_common import errors
from tinkerbell.v1 import common_pb2
from trainer_service.engine import Adapter, Engine, Snapshot, adapter_not_found
from trainer_service.executor import Executor
from trainer_service.publish.grpc_push import GrpcPublisher
from trainer_service.scheduler import Turn, Turns


@dataclass
class _Entry:
    """What the trainer keeps about an adapter beside the engine's part."""

    turns: Turns
    publish_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    published_version: int = 0


@dataclass(frozen=True)
class AdapterStatus:
    """An adapter and its place in the order of operations."""

    adapter: Adapter
    published_version: int
    next_seq_id: int


@dataclass(frozen=True)
class Sync:
    """A published version."""

    version: int
    digest: str
    sent_bytes: int
    seconds: float


class Trainer:
    """Puts operations in order and hands them to the executor."""

    def __init__(self, engine: Engine, executor: Executor, publisher: GrpcPublisher | None):
        """`engine` is read here for facts that do not change; whatever computes goes through `executor`."""
        self.engine = engine
        self.executor = executor
        self.publisher = publisher
        self._entries: dict[str, _Entry] = {}
        self._loading = asyncio.Lock()
        self.loaded = asyncio.Event()

    @property
    def loading(self) -> bool:
        """Whether a base model is being loaded at this moment."""
        return self._loading.locked()

    async def load_base_model(self, name: str, report: Callable[[str], None]) -> None:
        """Finds and loads a checkpoint; `report` is called, on any thread, with each stage as it begins."""
        async with self._loading:
            report("RESOLVING")
            checkpoint = await asyncio.to_thread(checkpoints.resolve, name)
            await self.executor.run(Engine.load_base_model, checkpoint, report)
        self.loaded.set()

    async def create_adapter(self, adapter_id: str, config: common_pb2.LoraConfig, seed: int) -> AdapterStatus:
        """See Engine.create_adapter."""
        adapter = await self.executor.run(Engine.create_adapter, adapter_id, config, seed)
        self._entries[adapter_id] = _Entry(Turns(adapter_id))
        return self._status(adapter)

    async def remove_adapter(self, adapter_id: str) -> None:
        """See Engine.remove_adapter. Operations that wait for their turn fail."""
        entry = self._entry(adapter_id)
        await self.executor.run(Engine.remove_adapter, adapter_id)
        entry.turns.close()
        del self._entries[adapter_id]

    async def list_adapters(self) -> list[AdapterStatus]:
        """All adapters in order of creation."""
        adapters = await self.executor.run(Engine.list_adapters)
        return [self._status(adapter) for adapter in adapters if adapter.adapter_id in self._entries]

    @contextlib.asynccontextmanager
    async def turn(self, adapter_id: str, seq_id: int) -> AsyncIterator[Turn]:
        """Holds the adapter's turn; see Turns.take. The bare base model, named by an empty id, has no order."""
        if not adapter_id:
            yield Turn(Turns(""), numbered=False)
            return
        async with self._entry(adapter_id).turns.take(seq_id) as turn:
            yield turn

    async def snapshot(self, adapter_id: str, dtype: common_pb2.DataType) -> Snapshot:
        """See Engine.snapshot."""
        return await self.executor.run(Engine.snapshot, adapter_id, dtype)

    async def sync(self, adapter_id: str, turn: Turn) -> Sync:
        """Publishes the adapter as it is at its turn, and passes the turn on as soon as the weights are copied.

        Training goes on while the tensors travel. Syncs of one adapter follow each other.
        """
        if self.publisher is None:
            raise errors.failed_precondition(
                "NO_SAMPLER", "this trainer has no sampler to publish to; start it with --sampler HOST:PORT"
            )
        entry = self._entry(adapter_id)
        async with entry.publish_lock:
            started = time.monotonic()
            snapshot = await self.snapshot(adapter_id, await self.publisher.data_type())
            turn.pass_on()
            published = await self.publisher.publish(adapter_id, snapshot, entry.published_version + 1)
            entry.published_version = published.version
        return Sync(published.version, published.digest, published.sent_bytes, time.monotonic() - started)

    async def close(self) -> None:
        """Ends what is running."""
        if self.publisher is not None:
            await self.publisher.close()
        await asyncio.to_thread(self.executor.close)

    def _entry(self, adapter_id: str) -> _Entry:
        try:
            return self._entries[adapter_id]
        except KeyError:
            raise adapter_not_found(adapter_id, list(self._entries)) from None

    def _status(self, adapter: Adapter) -> AdapterStatus:
        entry = self._entries[adapter.adapter_id]
        return AdapterStatus(adapter, entry.published_version, entry.turns.next_seq_id)
