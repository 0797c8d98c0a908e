"""Keeps every sampler at the current version of every adapter.

Two things bring a version to a sampler: `publish`, and the watch, which looks after every sampler all the time and
brings one that is new, restarted or was missed by a `publish` up to date before it confirms that it is current.

What is current lives in this process's memory. After a restart of the trainer it is what the samplers have: the watch
adopts the highest version that any of them serves, and reads it from that one when another one lacks it.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from service_common import errors
from service_common.errors import ServiceError
from tinkerbell.errors import TinkerbellError, UnavailableError
from tinkerbell.payload import PayloadError
from tinkerbell.v1 import common_pb2, sampler_pb2
from trainer_service.engine import adapter_not_found
from trainer_service.metrics import Metrics
from trainer_service.publish import channels
from trainer_service.publish.discovery import Discovery
from trainer_service.publish.parity import Difference, Probe
from trainer_service.publish.relays import Relays
from trainer_service.publish.replica import Replica, Served
from trainer_service.publish.transaction import ReplicaOutcome, ReplicaState, Transaction, Transport
from trainer_service.snapshot import Snapshot

if TYPE_CHECKING:  # needs CUDA's library
    from trainer_service.publish.cuda_ipc import CudaIpc, Staged

log = structlog.get_logger(__name__)

_WATCH_SECONDS = 2.0

# Notes, so that a restart does not lose it, that an adapter's versions up to this one are used.
Reserve = Callable[[str, int], Awaitable[None]]


@dataclass(frozen=True)
class Publication:
    """A published version, and what became of it at each sampler, in order of address."""

    version: int
    digest: str
    replicas: Sequence[ReplicaOutcome]

    @property
    def sent_bytes(self) -> int:
        """To all samplers together."""
        return sum(outcome.sent_bytes for outcome in self.replicas)

    @property
    def transport(self) -> Transport:
        """The slowest way that a payload went."""
        return max((outcome.transport for outcome in self.replicas), key=lambda transport: transport.value)


@dataclass(frozen=True)
class Comparison:
    """One sampler beside the trainer: a difference, or why there is none."""

    address: str
    difference: Difference | None
    error: str


@dataclass(frozen=True)
class _Current:
    """A current version. `snapshot` is None when it was found on a sampler."""

    version: int
    digest: str
    snapshot: Snapshot | None = None


@dataclass
class _Adapter:
    """An adapter that is looked after. `used`: the highest version number that may have been used."""

    used: int
    current: _Current | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class _State:
    """The process at a sampler's address, and the latest versions that it has."""

    instance: str
    served: Mapping[str, Served]


class Publisher:
    """Publishes to all samplers that a discovery finds."""

    def __init__(
        self,
        discovery: Discovery,
        reserve: Reserve,
        metrics: Metrics,
        relays: Relays,
        cuda_ipc: "CudaIpc | None" = None,
    ):
        """`relays`: to send parts over gRPC; this closes them. `cuda_ipc`: None to send everything over gRPC."""
        self._relays = relays
        self._cuda_ipc = cuda_ipc
        self._discovery = discovery
        self._reserve = reserve
        self._metrics = metrics
        self._replicas: dict[str, Replica] = {}
        self._adapters: dict[str, _Adapter] = {}
        self._used: dict[str, int] = {}  # the numbers of adapters that are gone, whose versions samplers may have
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._looked = asyncio.Event()  # whether the samplers have been looked up
        self._watching: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> list[str]:
        """Of the samplers that are known now, in order."""
        return sorted(self._replicas)

    def start(self) -> None:
        """Begins to watch. For when the trainer has all its adapters: what it does not have it does not look after."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    def manage(self, adapter_id: str, version: int = 0) -> None:
        """Looks after an adapter whose versions up to `version` were used in an earlier life of the trainer."""
        self._adapters[adapter_id] = _Adapter(used=max(version, self._used.pop(adapter_id, 0)))

    def forget(self, adapter_id: str) -> None:
        """Ends that. Samplers keep the versions that they have."""
        self._used[adapter_id] = self._next(self._adapters.pop(adapter_id)) - 1
        with contextlib.suppress(KeyError):  # none was measured
            self._metrics.drift.remove(adapter_id)

    def version(self, adapter_id: str) -> int:
        """The last version of an adapter that is looked after, or of one of that name that is gone; 0 if none."""
        adapter = self._adapters[adapter_id]
        return adapter.current.version if adapter.current else adapter.used

    async def data_type(self) -> common_pb2.DataType:
        """The samplers' own element type; sending another one would only be rounded there. UNAVAILABLE."""
        await self._looked.wait()
        failures = []
        for replica in self._in_order():
            if replica.dtype:
                return replica.dtype
            try:
                await replica.instance()
            except TinkerbellError as failure:
                failures.append(f"{replica.address}: {failure}")
            else:
                return replica.dtype
        raise errors.unavailable(
            "SAMPLER_UNREACHABLE",
            f"no sampler can be reached ({'; '.join(failures) or 'none is known'}); nothing was published, and the "
            "next SyncAdapter will try again",
            sampler=",".join(self.addresses),
        )

    @contextlib.asynccontextmanager
    async def staged(self, size_bytes: int, transport: Transport) -> "AsyncIterator[Staged | None]":
        """Where to copy a payload to that goes by this transport, until the block ends; None if nowhere.

        FAILED_PRECONDITION when this trainer does not have the transport.
        """
        if self._cuda_ipc and transport is not Transport.GRPC:
            async with self._cuda_ipc.staged(size_bytes, self._in_order()) as staged:
                yield staged
        elif transport is Transport.CUDA_IPC:
            raise errors.failed_precondition(
                "CUDA_IPC_UNAVAILABLE",
                "this trainer shows nobody its GPU memory; start it on a GPU with --cuda-ipc, or leave the transport "
                "open",
            )
        else:
            yield None

    async def publish(
        self,
        adapter_id: str,
        snapshot: Snapshot,
        probe: Probe | None = None,
        staged: "Staged | None" = None,
        transport: Transport = Transport.UNSPECIFIED,
    ) -> Publication:
        """Makes the snapshot of an adapter its current version on all samplers that are there.

        `staged`: what `staged` gave, filled with the snapshot. Publications of one adapter follow each other in the
        order of the calls. ServiceError when nothing was published, or when it is decided and nobody has answered; see
        Transaction.
        """
        adapter = self._adapter(adapter_id)
        digest = snapshot.manifest.digest
        async with adapter.lock:
            current = adapter.current
            # A number that was used since may be live somewhere, and what is to be the latest must be above it.
            is_current = current is not None and current.digest == digest and current.version >= adapter.used
            number = current.version if current and is_current else self._next(adapter)
            replicas = self._in_order()
            # As far as is known before the push.
            num_over_grpc = sum(staged is None or not staged.reaches(replica) for replica in replicas)
            async with self._relays.shared(snapshot, num_over_grpc) as shared:
                transaction = Transaction(adapter_id, snapshot, replicas, probe, staged, transport, shared)
                try:
                    version, outcomes = await transaction.run(
                        number, lambda number: self._use(adapter_id, adapter, number)
                    )
                except BaseException:
                    for replica in replicas:  # the watch looks what they have
                        replica.current_instance = ""
                    raise
            adapter.current = _Current(version, digest, snapshot)
        for outcome in outcomes:
            if outcome.state is ReplicaState.DOWN and outcome.address in self._replicas:
                self._replicas[outcome.address].current_instance = ""
        if all(outcome.state is ReplicaState.DOWN for outcome in outcomes):
            raise _nobody_answered(adapter_id, version, outcomes)
        publication = Publication(version, digest, outcomes)
        for outcome in outcomes:
            if outcome.sent_bytes:
                self._metrics.pushed_bytes.labels(outcome.transport.name.lower()).inc(outcome.sent_bytes)
        differences = [outcome.difference.mean for outcome in outcomes if outcome.difference]
        if differences:
            self._metrics.drift.labels(adapter_id).set(max(differences))
        return publication

    async def compare(self, adapter_id: str, step: int, probe: Probe) -> tuple[Served, int, list[Comparison]]:
        """What is current, the steps from then to `step`, and every sampler's distance from the trainer.

        FAILED_PRECONDITION when no version of the adapter is known.
        """
        current = self._adapter(adapter_id).current
        if current is None:
            raise errors.failed_precondition(
                "NOT_PUBLISHED",
                f"adapter {adapter_id!r} has no version that this trainer knows of; sync it first",
                adapter_id=adapter_id,
            )

        async def one(replica: Replica) -> Comparison:
            try:
                logprobs = await replica.score(adapter_id, current.version, probe.sequences)
            except TinkerbellError as failure:
                return Comparison(replica.address, None, str(failure))
            return Comparison(replica.address, probe.compare(logprobs, replica.dtype), "")

        comparisons = await asyncio.gather(*map(one, self._in_order()))
        differences = [comparison.difference.mean for comparison in comparisons if comparison.difference]
        if differences:
            self._metrics.drift.labels(adapter_id).set(max(differences))
        published = current.snapshot.step if current.snapshot else None
        steps_since = 0 if published is None else step - published
        return Served(current.version, current.digest), steps_since, list(comparisons)

    async def close(self) -> None:
        """Ends the watch and closes the connections."""
        tasks = [*self._joining.values(), *self._leaving, *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._replicas.values():
            await replica.close()
        await self._relays.close()

    def _adapter(self, adapter_id: str) -> _Adapter:
        try:
            return self._adapters[adapter_id]
        except KeyError:  # removed meanwhile
            raise adapter_not_found(adapter_id, list(self._adapters)) from None

    def _in_order(self) -> list[Replica]:
        return [self._replicas[address] for address in self.addresses]

    def _next(self, adapter: _Adapter) -> int:
        return max(adapter.used, adapter.current.version if adapter.current else 0) + 1

    async def _use(self, adapter_id: str, adapter: _Adapter, number: int) -> None:
        if number > adapter.used:
            await self._reserve(adapter_id, number)
            adapter.used = number

    async def _watch(self) -> None:
        while True:
            try:
                await self._look_after_all()
            except Exception:  # whatever it was, the next round tries again
                log.exception("watch_failed")
            await asyncio.sleep(_WATCH_SECONDS)

    async def _look_after_all(self) -> None:
        await self._look_up()
        # First all are asked, then any is helped: what one of them has may be what another one lacks.
        replicas = self._in_order()
        states = await asyncio.gather(*map(self._look_at, replicas))
        behind = [(replica, state) for replica, state in zip(replicas, states, strict=True) if state is not None]
        for replica, state in behind:
            self._adopt(replica, state.served)
        for replica, state in behind:
            if replica.address not in self._joining:
                self._joining[replica.address] = asyncio.create_task(self._join(replica, state))
        num_behind = sum(not replica.current_instance for replica in self._replicas.values())
        self._metrics.samplers.labels("behind").set(num_behind)
        self._metrics.samplers.labels("current").set(len(self._replicas) - num_behind)

    async def _look_up(self) -> None:
        found = await self._discovery.addresses()
        for address in set(self._replicas) - set(found):
            log.info("sampler_gone", sampler=address)
            leaving = asyncio.create_task(_close_later(self._replicas.pop(address)))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        for address in set(found) - set(self._replicas):
            log.info("sampler_found", sampler=address)
            self._replicas[address] = Replica(address)
        self._looked.set()

    async def _look_at(self, replica: Replica) -> _State | None:
        """What a sampler has that may be behind; None for one that is current, and for one that is not there."""
        try:
            instance = await replica.instance()
            return None if instance == replica.current_instance else _State(instance, await replica.served())
        except TinkerbellError as failure:
            if replica.current_instance:
                log.warning("sampler_lost", sampler=replica.address, error=str(failure))
            replica.current_instance = ""
            return None

    def _adopt(self, replica: Replica, served: Mapping[str, Served]) -> None:
        """Takes what a sampler has for current where it is the newest: a trainer that is gone has published it."""
        for adapter_id, theirs in served.items():
            adapter = self._adapters.get(adapter_id)
            if adapter is None or adapter.lock.locked():  # being published, which tells what is current
                continue
            if adapter.current is None or theirs.version > adapter.current.version:
                log.info("version_adopted", adapter_id=adapter_id, version=theirs.version, sampler=replica.address)
                adapter.current = _Current(theirs.version, theirs.digest)
                for other in self._replicas.values():
                    other.current_instance = ""

    async def _join(self, replica: Replica, state: _State) -> None:
        """Brings a sampler up to date and tells it so."""
        replica.current_instance = state.instance  # what misses the sampler from here on takes this back
        is_confirmed = False
        try:
            for adapter_id, adapter in list(self._adapters.items()):
                async with adapter.lock:
                    current = adapter.current if self._adapters.get(adapter_id) is adapter else None
                    theirs = state.served.get(adapter_id)
                    if current and theirs and theirs.version > current.version:
                        # To be adopted: this round could not, as the adapter was being published.
                        replica.current_instance = ""
                    elif current and theirs != Served(current.version, current.digest):
                        adapter.current = await self._send(adapter_id, current, replica)
            if replica.current_instance == state.instance:
                await replica.confirm_current()
                is_confirmed = True
                log.info("sampler_current", sampler=replica.address)
        except Exception as failure:  # whatever it was, the next round tries again
            expected = isinstance(failure, TinkerbellError)
            log.warning("sampler_behind", sampler=replica.address, error=str(failure), exc_info=not expected)
        finally:
            if not is_confirmed:
                replica.current_instance = ""
            del self._joining[replica.address]

    async def _send(self, adapter_id: str, current: _Current, replica: Replica) -> _Current:
        """Pushes what is current to one sampler, having read it from another one if need be."""
        if current.snapshot is None:
            current = dataclasses.replace(current, snapshot=await self._read(adapter_id, current))
        assert current.snapshot is not None
        begin = sampler_pb2.PushBegin(
            adapter_id=adapter_id, version=current.version, manifest=current.snapshot.manifest
        )
        await replica.push_whole(begin, current.snapshot.payload)
        log.info("version_sent", adapter_id=adapter_id, version=current.version, sampler=replica.address)
        return current

    async def _read(self, adapter_id: str, current: _Current) -> Snapshot:
        """A version from whichever sampler has it. UnavailableError when none answers with it."""
        failures = []
        for replica in self._in_order():
            try:
                snapshot = await replica.read(adapter_id, current.version)
            except (TinkerbellError, PayloadError) as failure:
                failures.append(f"{replica.address}: {failure}")
            else:
                if snapshot.manifest.digest == current.digest:
                    return snapshot
                failures.append(f"{replica.address}: another content")
        raise UnavailableError(
            f"no sampler can hand on version {current.version} of adapter {adapter_id!r} ({'; '.join(failures)})"
        )


async def _close_later(replica: Replica) -> None:
    """When no push can be on its connection any more: that would cancel it."""
    try:
        await asyncio.sleep(2 * channels.PUSH_SECONDS)
    finally:
        await replica.close()


def _nobody_answered(adapter_id: str, version: int, outcomes: Sequence[ReplicaOutcome]) -> ServiceError:
    lost = "; ".join(f"{outcome.address}: {outcome.error}" for outcome in outcomes)
    return errors.unavailable(
        "PUSH_FAILED",
        f"version {version} of adapter {adapter_id!r} is decided, and no sampler has answered COMMIT ({lost}). As "
        "long as this trainer lives, it is current, and every sampler that does not have it gets it when it is back",
        adapter_id=adapter_id,
        version=version,
        samplers=",".join(outcome.address for outcome in outcomes),
    )
