"""The trainer as its clients see it: adapters, operations in order and done once, shared passes, publishing,
checkpoints.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from google.protobuf.message import Message

from service_common import checkpoint as checkpoints
from service_common import errors, lora
from service_common.checkpoint import Checkpoint
from service_common.errors import Code, ServiceError
from tinkerbell.tensors import dtype_size
from tinkerbell.v1 import common_pb2
from trainer_service import batch
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.batching import Batcher, Computed
from trainer_service.checkpoints import AdapterState, CheckpointInfo, CheckpointStore
from trainer_service.commands import Commands
from trainer_service.engine import (
    AdapterInfo,
    Engine,
    OptimizerState,
    StepResult,
    Tensors,
    adapter_not_found,
    no_base_model,
)
from trainer_service.executor import Executor
from trainer_service.idempotency import Answers, body
from trainer_service.losses import Loss, LossConfig
from trainer_service.metrics import Metrics
from trainer_service.order import Turn, Turns
from trainer_service.publish import parity
from trainer_service.publish.parity import Probe
from trainer_service.publish.publisher import Comparison, Publication, Publisher
from trainer_service.publish.replica import Served
from trainer_service.publish.transaction import Transport
from trainer_service.ranks import OnRankZero
from trainer_service.snapshot import Snapshot

log = structlog.get_logger(__name__)

_EXPIRE_SECONDS = 60.0
_DRAIN_SECONDS = 8.0  # after the calls that have a caller; torchrun kills 30 s after it passed a signal on


@dataclass
class _Entry:
    """What the trainer keeps about an adapter beside the engine's part."""

    num_parameters: int  # the engine's too, which would answer only when the pass that is running has ended
    turns: Turns
    answers: Answers = field(default_factory=Answers)


@dataclass(frozen=True)
class AdapterStatus:
    """An adapter and its place in the order of operations."""

    info: AdapterInfo
    published_version: int
    next_seq_id: int


@dataclass(frozen=True)
class Verification:
    """What to compare a sampler by; as in trainer.proto. No sequences stand for parity.default_sequences."""

    sequences: Sequence[Sequence[int]] = ()
    tolerance: float | None = None


class Trainer:
    """Puts operations in order and hands them to the engine."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        metrics: Metrics,
        publisher: Publisher | None = None,
        store: CheckpointStore | None = None,
    ):
        """`engine` is read here for facts that do not change; whatever computes goes through `executor`.

        `store`: None for a trainer that keeps no checkpoints.
        """
        self.engine = engine
        self.publisher = publisher
        self.loaded = asyncio.Event()
        self._executor = executor
        self._commands = Commands(executor)
        self._metrics = metrics
        self._batcher = Batcher(self._commands, metrics, engine.limits.max_pass_tokens)
        self._store = store
        self._entries: dict[str, _Entry] = {}
        self._answers = Answers()  # to what does not belong to one adapter
        self._tasks: set[asyncio.Task] = set()
        self._loading = asyncio.Lock()
        self._expiring: asyncio.Task[None] | None = None

    @property
    def loading(self) -> bool:
        """Whether a base model is being loaded at this moment."""
        return self._loading.locked()

    async def load_base_model(self, name: str, report: Callable[[str], None]) -> None:
        """Finds and loads a checkpoint; `report` is called, on any thread, with each stage as it begins.

        Then restores the adapters that the checkpoint store has, each from its last checkpoint.
        """
        async with self._loading:
            report("RESOLVING")
            found = await asyncio.to_thread(checkpoints.resolve, name)
            await self._commands.run(Engine.load_base_model, found, OnRankZero(report))
            if self._store is not None and not self.loaded.is_set():
                await self._restore(self._store, found)
        self.loaded.set()
        if self._store is not None and self._expiring is None:
            self._expiring = asyncio.create_task(_expire(self._store))
        if self.publisher is not None:
            self.publisher.start()

    async def once[T: Message](self, adapter_id: str, request: Message, work: Callable[[], Awaitable[T]]) -> T:
        """Does `work`, or answers with what it came to when the same request was there before; see Answers.once.

        `adapter_id`: whose answers the request belongs to; empty for the trainer's own.
        """
        await self._until_restored()
        answers = self._entry(adapter_id).answers if adapter_id else self._answers
        return await answers.once(request.request_id, body(request), work)  # type: ignore[attr-defined]

    async def to_the_end[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Does `work`, to its end also when the caller goes away: whoever waits for a turn must not be cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def create_adapter(self, adapter_id: str, config: common_pb2.LoraConfig, seed: int) -> AdapterStatus:
        """See Engine.create_adapter."""
        return self._enter(await self._commands.run(Engine.create_adapter, adapter_id, config, seed))

    async def create_from_checkpoint(
        self, adapter_id: str, checkpoint_id: str, *, fresh_optimizer: bool
    ) -> AdapterStatus:
        """A new adapter that begins where a checkpoint stands."""
        state = await self._load_state(checkpoint_id)
        tensors, step, last_adam = _resumed(state, fresh_optimizer)
        info = await self._commands.run(
            Engine.create_adapter, adapter_id, state.config, state.seed, tensors, step, last_adam
        )
        return self._enter(info)

    async def remove_adapter(self, adapter_id: str) -> None:
        """Frees an adapter once the operations that have begun are done; those that wait for their turn fail.

        A restart does not bring it back.
        """
        entry = self._entry(adapter_id)
        del self._entries[adapter_id]
        entry.turns.close()
        # A pass that misses one of its adapters fails for all, and a checkpoint saved later would bring this one back.
        await entry.turns.wait_idle()
        await entry.answers.wait_idle()
        try:
            if self._store is not None:
                await asyncio.to_thread(self._store.mark_removed, adapter_id)
        except ServiceError:
            self._entries[adapter_id] = entry
            raise
        if self.publisher is not None:
            self.publisher.forget(adapter_id)
        await self._commands.run(Engine.remove_adapter, adapter_id)
        self._metrics.adapters.set(len(self._entries))

    async def list_adapters(self) -> list[AdapterStatus]:
        """All adapters in order of creation."""
        await self._until_restored()
        adapters = await self._commands.run(Engine.list_adapters)
        return [self._status(info) for info in adapters if info.adapter_id in self._entries]

    @contextlib.asynccontextmanager
    async def turn(self, adapter_id: str, seq_id: int, *, alone: bool = False) -> AsyncIterator[Turn]:
        """Holds the adapter's turn; see Turns.take. The bare base model, named by an empty id, has no order."""
        if not adapter_id:
            yield Turn(Turns(""), held=False)
            return
        await self._until_restored()
        async with self._entry(adapter_id).turns.take(seq_id, alone=alone) as turn:
            yield turn

    async def compute(
        self, adapter_id: str, data: Sequence[Datum], loss: Loss, config: LossConfig, *, backward: bool
    ) -> Computed:
        """Log-probabilities and loss; with `backward`, adds its gradient to the adapter's. Inside the turn."""
        found = self._base_model()
        limits = self.engine.limits
        batch.check(data, loss, found.vocab_size, found.max_sequence_length, limits.max_batch_tokens)
        if adapter_id or backward:
            self._entry(adapter_id)
        with self._counting_refusals():
            return await self._batcher.compute(adapter_id, data, loss, config, backward)

    async def optim_step(self, adapter_id: str, params: AdamParams) -> StepResult:
        """See Engine.optim_step."""
        with self._counting_refusals():
            result = await self._commands.run(Engine.optim_step, adapter_id, params)
        self._metrics.steps.inc()
        return result

    async def optimizer_state(self, adapter_id: str) -> OptimizerState:
        """See Engine.optimizer_state."""
        return await self._commands.run(Engine.optimizer_state, adapter_id)

    async def optimizer_states(self) -> list[OptimizerState]:
        """See Engine.optimizer_states."""
        return await self._commands.run(Engine.optimizer_states)

    async def moments(self, adapter_id: str) -> tuple[Snapshot, Snapshot]:
        """See Engine.moments."""
        return await self._commands.run(Engine.moments, adapter_id)

    async def snapshot(self, adapter_id: str, dtype: common_pb2.DataType) -> Snapshot:
        """See Engine.snapshot."""
        return await self._commands.run(Engine.snapshot, adapter_id, dtype)

    def check_import(self, manifest: common_pb2.AdapterManifest) -> None:
        """INVALID_ARGUMENT or FAILED_PRECONDITION unless the base model can carry what an import announces."""
        lora.check_manifest(manifest, self._base_model(), self.engine.limits.max_rank)

    async def import_weights(
        self, adapter_id: str, seq_id: int, config: common_pb2.LoraConfig, tensors: Tensors
    ) -> AdapterStatus:
        """Replaces an adapter's weights at its turn, or makes an adapter of them."""
        if adapter_id not in self._entries:
            return self._enter(await self._commands.run(Engine.create_adapter, adapter_id, config, 0, tensors))
        async with self.turn(adapter_id, seq_id, alone=True):
            return await self._replace(adapter_id, config, tensors)

    async def sync(
        self,
        adapter_id: str,
        turn: Turn,
        verify: Verification | None = None,
        transport: Transport = Transport.UNSPECIFIED,
    ) -> Publication:
        """Publishes the adapter as it is at its turn, and passes the turn on as soon as the weights are copied.

        Training goes on while the tensors travel. Syncs of one adapter follow each other.
        """
        publisher = self._publisher()
        num_parameters = self._entry(adapter_id).num_parameters
        dtype = await publisher.data_type()
        async with publisher.staged(num_parameters * dtype_size(dtype), transport) as staged:
            snapshot = await self._commands.run(Engine.snapshot, adapter_id, dtype, staged.fill if staged else None)
            probe = await self._probe(adapter_id, verify) if verify else None
            turn.pass_on()
            return await publisher.publish(adapter_id, snapshot, probe, staged, transport)

    async def verify(self, adapter_id: str, verify: Verification) -> tuple[Served, int, list[Comparison]]:
        """Compares the adapter as it is with what the samplers serve; see Publisher.compare. Inside the turn."""
        publisher = self._publisher()
        self._entry(adapter_id)
        probe = await self._probe(adapter_id, verify)
        return await publisher.compare(adapter_id, (await self._commands.run(Engine.info, adapter_id)).step, probe)

    async def save_checkpoint(self, adapter_id: str, name: str, ttl_seconds: float, turn: Turn) -> CheckpointInfo:
        """Writes the adapter as it is at its turn, and passes the turn on as soon as the tensors are copied."""
        store, entry = self._checkpoint_store(), self._entry(adapter_id)
        found = self._base_model()
        tensors, optimizer, info = await asyncio.gather(
            self._commands.run(Engine.tensors, adapter_id),
            self._commands.run(Engine.optimizer_state, adapter_id, tensors=False),
            self._commands.run(Engine.info, adapter_id),
        )
        state = AdapterState(
            adapter_id=adapter_id,
            config=info.config,
            base_model_name=found.name,
            base_model_fingerprint=found.fingerprint,
            seed=info.seed,
            step=optimizer.step,
            seq_id=entry.turns.next_seq_id - 1,
            last_adam=vars(optimizer.last_adam) if optimizer.last_adam else None,
            published_version=self._version(adapter_id),
            replies=entry.answers.saved(),
            weights=dict(tensors.weights),
            exp_avg=dict(tensors.exp_avg or {}),
            exp_avg_sq=dict(tensors.exp_avg_sq or {}),
        )
        turn.pass_on()
        return await asyncio.to_thread(store.save, state, name or f"step-{state.step}", ttl_seconds)

    async def load_checkpoint(self, adapter_id: str, checkpoint_id: str, *, fresh_optimizer: bool) -> AdapterStatus:
        """Takes an adapter to a checkpoint. Inside the turn."""
        self._entry(adapter_id)
        state = await self._load_state(checkpoint_id)
        return await self._replace(adapter_id, state.config, *_resumed(state, fresh_optimizer))

    async def list_checkpoints(self, adapter_id: str) -> Sequence[CheckpointInfo]:
        """Whole checkpoints, oldest first."""
        return await asyncio.to_thread(self._checkpoint_store().list, adapter_id)

    async def delete_checkpoint(self, checkpoint_id: str) -> None:
        """See CheckpointStore.delete."""
        await asyncio.to_thread(self._checkpoint_store().delete, checkpoint_id)

    async def close(self) -> None:
        """Ends what is running; operations that wait for their turn fail."""
        for entry in self._entries.values():
            entry.turns.close()
        waiting = [entry.answers.wait_idle() for entry in self._entries.values()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                await asyncio.gather(self._answers.wait_idle(), *waiting, *self._tasks, return_exceptions=True)
        if self._expiring is not None:
            self._expiring.cancel()
            await asyncio.gather(self._expiring, return_exceptions=True)
        if self.publisher is not None:
            await self.publisher.close()
        await asyncio.to_thread(self._executor.close)

    async def _restore(self, store: CheckpointStore, found: Checkpoint) -> None:
        if not self._entries:  # else this is another try, and somebody may be saving
            await asyncio.to_thread(store.clear_leftovers)
        for adapter_id, infos in (await asyncio.to_thread(store.restorable)).items():
            if adapter_id in self._entries:  # since a first try that failed
                continue
            state = await asyncio.to_thread(_last_whole, store, infos)
            if state is None or state.base_model_fingerprint != found.fingerprint:
                log.warning("adapter_not_restored", adapter_id=adapter_id, damaged=state is None)
                continue
            tensors, step, last_adam = _resumed(state, fresh_optimizer=False)
            try:
                info = await self._commands.run(
                    Engine.create_adapter, adapter_id, state.config, state.seed, tensors, step, last_adam
                )
            except ServiceError as refusal:  # this trainer's limits are lower
                log.warning("adapter_not_restored", adapter_id=adapter_id, error=refusal.message)
                continue
            self._entries[adapter_id] = _Entry(
                info.num_parameters,
                Turns(adapter_id, next_seq_id=state.seq_id + 1, restored_step=step),
                Answers(state.replies),
            )
            if self.publisher is not None:
                self.publisher.manage(adapter_id, max(state.published_version, store.published(adapter_id)))
            log.info("adapter_restored", adapter_id=adapter_id, step=step, next_seq_id=state.seq_id + 1)
        self._metrics.adapters.set(len(self._entries))

    async def _until_restored(self) -> None:
        """Waits while the first base model is being loaded: after a restart, its adapters come back with it."""
        if self.loading and not self.loaded.is_set():
            async with self._loading:
                pass

    async def _load_state(self, checkpoint_id: str) -> AdapterState:
        state = await asyncio.to_thread(self._checkpoint_store().load, checkpoint_id)
        found = self._base_model()
        if state.base_model_fingerprint != found.fingerprint:
            raise errors.failed_precondition(
                "BASE_MODEL_MISMATCH",
                f"checkpoint {checkpoint_id} belongs to base model {state.base_model_name} "
                f"({state.base_model_fingerprint[:12]}…), and this trainer holds {found.name}",
                adapter_base_model=state.base_model_fingerprint,
                service_base_model=found.fingerprint,
            )
        return state

    async def _replace(
        self,
        adapter_id: str,
        config: common_pb2.LoraConfig,
        tensors: Tensors,
        step: int = 0,
        last_adam: AdamParams | None = None,
    ) -> AdapterStatus:
        current = await self._commands.run(Engine.info, adapter_id)
        for name in tensors.weights:
            path = lora.path_of(name)
            ours, theirs = lora.module_scale(current.config, path), lora.module_scale(config, path)
            if ours != theirs:
                raise errors.invalid_argument(
                    "SCALE_MISMATCH",
                    f"adapter {adapter_id!r} scales {path} by {ours:g}, and what is loaded by {theirs:g}; alpha, "
                    "alpha_pattern and use_rslora must come to the same, or the adapter must be a new one",
                    adapter_id=adapter_id,
                )
        return self._status(await self._commands.run(Engine.replace_weights, adapter_id, tensors, step, last_adam))

    def _enter(self, info: AdapterInfo) -> AdapterStatus:
        self._entries[info.adapter_id] = _Entry(info.num_parameters, Turns(info.adapter_id))
        if self.publisher is not None:
            self.publisher.manage(info.adapter_id, self._store.published(info.adapter_id) if self._store else 0)
        self._metrics.adapters.set(len(self._entries))
        return self._status(info)

    def _entry(self, adapter_id: str) -> _Entry:
        try:
            return self._entries[adapter_id]
        except KeyError:
            raise adapter_not_found(adapter_id, list(self._entries)) from None

    def _status(self, info: AdapterInfo) -> AdapterStatus:
        entry = self._entry(info.adapter_id)
        return AdapterStatus(info, self._version(info.adapter_id), entry.turns.next_seq_id)

    def _version(self, adapter_id: str) -> int:
        return self.publisher.version(adapter_id) if self.publisher is not None else 0

    def _publisher(self) -> Publisher:
        if self.publisher is None:
            raise errors.failed_precondition(
                "NO_SAMPLER", "this trainer has no sampler to publish to; start it with --sampler HOST:PORT"
            )
        return self.publisher

    async def _probe(self, adapter_id: str, verify: Verification) -> Probe:
        """The trainer's half of a comparison."""
        found = self._base_model()
        if verify.tolerance is not None and not verify.tolerance > 0:
            raise errors.invalid_argument(
                "TOLERANCE_INVALID",
                f"verify.tolerance is {verify.tolerance}, and must be above 0",
                field="verify.tolerance",
                tolerance=verify.tolerance,
            )
        sequences = verify.sequences or parity.default_sequences(adapter_id, found.vocab_size)
        data = [batch.scored(tokens, f"verify.sequences[{index}]") for index, tokens in enumerate(sequences)]
        computed = await self.compute(adapter_id, data, Loss.CROSS_ENTROPY, LossConfig(), backward=False)
        return Probe(sequences, computed.logprobs, verify.tolerance)

    def _base_model(self) -> Checkpoint:
        if self.engine.checkpoint is None:
            raise no_base_model()
        return self.engine.checkpoint

    def _checkpoint_store(self) -> CheckpointStore:
        if self._store is None:
            raise errors.failed_precondition(
                "NO_CHECKPOINT_FOLDER", "this trainer keeps no checkpoints; start it with --checkpoints FOLDER"
            )
        return self._store

    @contextlib.contextmanager
    def _counting_refusals(self):
        try:
            yield
        except ServiceError as refusal:
            self._metrics.refusals.labels(refusal.reason).inc()
            raise


async def _expire(store: CheckpointStore) -> None:
    """Deletes the checkpoints whose time has come, again and again."""
    while True:
        try:
            for checkpoint_id in await asyncio.to_thread(store.expire, time.time()):
                log.info("checkpoint_expired", checkpoint_id=checkpoint_id)
        except ServiceError as failure:
            log.warning("checkpoints_not_expired", error=failure.message)
        await asyncio.sleep(_EXPIRE_SECONDS)


def _resumed(state: AdapterState, fresh_optimizer: bool) -> tuple[Tensors, int, AdamParams | None]:
    if fresh_optimizer:
        return Tensors(state.weights), 0, None
    last_adam = AdamParams(**state.last_adam) if state.last_adam else None
    return Tensors(state.weights, state.exp_avg, state.exp_avg_sq), state.step, last_adam


def _last_whole(store: CheckpointStore, infos: Sequence[CheckpointInfo]) -> AdapterState | None:
    for info in reversed(infos):
        try:
            return store.load(info.checkpoint_id)
        except ServiceError as failure:
            if failure.code is Code.UNAVAILABLE:  # it may be whole, and newer than what would take its place
                raise
            log.warning("checkpoint_skipped", checkpoint_id=info.checkpoint_id, error=failure.message)
    return None
