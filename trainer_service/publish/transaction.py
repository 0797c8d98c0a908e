"""One version of one adapter onto every sampler, or onto none."""

import asyncio
import enum
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from service_common import errors, failpoints
from service_common.errors import Code, ServiceError
from tinkerbell.errors import AbortedError, AlreadyExistsError, TinkerbellError, UnavailableError
from tinkerbell.push import PushStream
from tinkerbell.v1 import sampler_pb2
from trainer_service.publish.parity import Difference, Probe
from trainer_service.publish.replica import Replica, is_down
from trainer_service.snapshot import Snapshot

if TYPE_CHECKING:  # needs CUDA's library
    from trainer_service.publish.cuda_ipc import Staged
    from trainer_service.publish.relays import SharedPayload

log = structlog.get_logger(__name__)

_MAX_NUMBERS = 8  # tried for one version before samplers count as contradicting each other
# A sampler that does not answer BEGIN for this long is down. No bytes have to travel for that answer.
_BEGIN_SECONDS = 10.0
_BUSY_SECONDS = 0.1


class ReplicaState(enum.Enum):
    """As in trainer.proto."""

    COMMITTED = enum.auto()
    ALREADY_LIVE = enum.auto()
    DOWN = enum.auto()


class Transport(enum.Enum):
    """As in trainer.proto, the slowest last."""

    UNSPECIFIED = 0
    CUDA_IPC = 1
    GRPC = 2


@dataclass(frozen=True)
class ReplicaOutcome:
    """What became of a version at one sampler; as ReplicaPublication in trainer.proto."""

    address: str
    state: ReplicaState
    sent_bytes: int
    seconds: float
    error: str
    difference: Difference | None
    transport: Transport
    no_cuda_ipc: str


@dataclass
class _Push:
    replica: Replica
    stream: PushStream
    live: sampler_pb2.AdapterVersion | None = None  # what it has of this digest, when it has
    logprobs: list = field(default_factory=list)
    memory_id: str = ""  # of the GPU memory out of which it reads the payload, if it does
    no_cuda_ipc: str = ""
    failure: TinkerbellError | None = None
    committed: bool = False
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    async def attempt(self, step: Callable[["_Push"], Awaitable[None]]) -> None:
        """Does a step, and keeps its failure."""
        try:
            await step(self)
        except TinkerbellError as failure:
            self.failure = failure
        except TimeoutError:
            self.failure = UnavailableError(f"no answer within {_BEGIN_SECONDS:g} s")


class Transaction:
    """Publishes one snapshot: BEGIN everywhere, then the payload and PREPARE everywhere, then COMMIT everywhere.

    A sampler that is alone is not asked to PREPARE, as its COMMIT does that first.

    A sampler that cannot be reached at BEGIN is left out. Any other failure before the first COMMIT ends all pushes,
    and no sampler has changed. When all that take part are ready the version is decided: a sampler that is lost after
    that counts as down, and gets the version when it is back. What a sampler that is alone has, when it is lost at
    COMMIT without having prepared, is not known.
    """

    def __init__(
        self,
        adapter_id: str,
        snapshot: Snapshot,
        replicas: Sequence[Replica],
        probe: Probe | None,
        staged: "Staged | None" = None,
        transport: Transport = Transport.UNSPECIFIED,
        shared: "SharedPayload | None" = None,
    ):
        """`replicas`: all that are known. `staged`: the snapshot in GPU memory; `shared`: in memory that relays send
        it from. None not to use that; both must stay as they are until `run` has ended. `transport`: CUDA_IPC to
        publish that way or not at all.
        """
        self._adapter_id = adapter_id
        self._snapshot = snapshot
        self._replicas = replicas
        self._probe = probe
        self._staged = staged
        self._transport = transport
        self._shared = shared
        self._pushes: list[_Push] = []

    async def run(self, number: int, reserve: Callable[[int], Awaitable[None]]) -> tuple[int, list[ReplicaOutcome]]:
        """Publishes as version `number`, or as a higher one when samplers have that already, with another content.

        `reserve` is called with the version before any sampler can make it live. Returns the version and an outcome
        for each replica; all are down if all were lost at COMMIT. ServiceError when nothing was published.
        """
        try:
            number = await self._begin_everywhere(number)
            taking_part = [push for push in self._pushes if push.failure is None]
            await failpoints.reached("sync.begun")
            prepares = len(taking_part) > 1 or self._probe is not None
            make_ready = functools.partial(self._make_ready, prepares=prepares)
            await asyncio.gather(reserve(number), *(push.attempt(make_ready) for push in taking_part))
            self._raise_unless_ready(number, taking_part)
            await failpoints.reached("sync.prepared")
            await asyncio.gather(*(push.attempt(self._commit) for push in taking_part))
            await failpoints.reached("sync.committed")
            failures = [push.failure for push in taking_part if push.failure]
            if len(failures) == len(taking_part) and not any(map(is_down, failures)):
                raise self._refusal(number, taking_part)
            if len(failures) == len(taking_part) and not prepares:
                raise self._unanswered(number)
            return number, [self._outcome(push) for push in self._pushes]
        finally:
            for push in self._pushes:
                push.stream.close()

    async def _begin_everywhere(self, number: int) -> int:
        accepting: set[Replica] = set()  # what they have as their latest version is something else
        for _ in range(_MAX_NUMBERS):
            self._pushes = [_Push(replica, replica.push()) for replica in self._replicas]
            announce = functools.partial(self._announce, number)
            await asyncio.gather(*(push.attempt(announce) for push in self._pushes))
            self._check_transport(number)
            refusing = [push for push in self._pushes if push.failure and not is_down(push.failure)]
            taken = [
                int(push.failure.metadata["latest_version"]) + 1
                for push in refusing
                if isinstance(push.failure, AlreadyExistsError)
            ]
            renumbered = taken + [push.live.version for push in self._pushes if push.live]
            if len(taken) < len(refusing):
                raise self._refusal(number, self._pushes)
            if all(push.failure and is_down(push.failure) for push in self._pushes):
                raise _nobody_there(self._adapter_id, self._pushes)
            some_live = any(push.live for push in self._pushes)
            behind = [
                push
                for push in self._pushes
                if push.replica in accepting
                and (push.live or (some_live and isinstance(push.failure, AlreadyExistsError)))
            ]
            if behind:
                raise errors.unavailable(
                    "PUSH_FAILED",
                    f"version {number} of adapter {self._adapter_id!r} was not published: some samplers have these "
                    f"weights as the latest version, and others ({_addresses(behind)}) have a later one. The "
                    "trainer brings them together; sync again",
                    adapter_id=self._adapter_id,
                    samplers=_addresses(behind),
                )
            if all(other == number for other in renumbered):
                return number
            accepting |= {push.replica for push in self._pushes if not push.failure and not push.live}
            for push in self._pushes:
                push.stream.close()
            number = max(renumbered)
        raise errors.failed_precondition(
            "SAMPLERS_DISAGREE",
            f"samplers have the same weights of adapter {self._adapter_id!r} under different numbers; unload the "
            "adapter from one of them and sync again",
            adapter_id=self._adapter_id,
        )

    async def _announce(self, number: int, push: _Push) -> None:
        """BEGIN at one sampler. It may not have noticed yet that the last push of the adapter was given up."""
        if self._staged:
            push.memory_id, push.no_cuda_ipc = await self._staged.opened_by(push.replica)
        begin = sampler_pb2.PushBegin(
            adapter_id=self._adapter_id,
            version=number,
            manifest=self._snapshot.manifest,
            device_memory_id=push.memory_id,
        )
        patience = time.monotonic() + _BEGIN_SECONDS
        while True:
            try:
                async with asyncio.timeout(_BEGIN_SECONDS):
                    committed = await push.stream.begin(begin)
            except AbortedError as busy:
                if busy.reason != "PUSH_IN_PROGRESS" or time.monotonic() > patience:
                    raise
                push.stream.close()
                await asyncio.sleep(_BUSY_SECONDS)
                push.stream = push.replica.push()
            else:
                push.live = committed.version if committed else None
                return

    def _check_transport(self, number: int) -> None:
        """FAILED_PRECONDITION if the payload would go another way than the one that was demanded."""
        if self._transport is not Transport.CUDA_IPC:
            return
        apart = [push for push in self._pushes if not (push.failure or push.live or push.memory_id)]
        if apart:
            obstacles = "; ".join(f"{push.replica.address}: {push.no_cuda_ipc}" for push in apart)
            raise errors.failed_precondition(
                "CUDA_IPC_UNAVAILABLE",
                f"version {number} of adapter {self._adapter_id!r} was not published: CUDA IPC was asked for, and does "
                f"not reach every sampler ({obstacles}); mend that, or leave the transport open",
                adapter_id=self._adapter_id,
                samplers=_addresses(apart),
            )

    async def _make_ready(self, push: _Push, prepares: bool) -> None:
        sequences = self._probe.sequences if self._probe else ()
        if push.live:
            if self._probe:
                push.logprobs = await push.replica.score(self._adapter_id, push.live.version, sequences)
            return
        if not push.memory_id:
            sent = await self._shared.send(push.replica.host, push.stream) if self._shared else 0
            await push.stream.send(self._snapshot.payload, sent)
        if prepares:
            push.logprobs = await push.stream.prepare(sequences)

    async def _commit(self, push: _Push) -> None:
        if not push.live:
            await failpoints.reached("sync.committing")
            await push.stream.commit()
        push.committed = True
        push.seconds = time.monotonic() - push.started

    def _raise_unless_ready(self, number: int, pushes: Sequence[_Push]) -> None:
        if any(push.failure for push in pushes):
            raise self._refusal(number, pushes)
        apart = [
            (push, difference)
            for push in pushes
            if (difference := self._difference(push)) is not None and not difference.agrees
        ]
        if apart:
            findings = "; ".join(
                f"{push.replica.address} by {difference.mean:.3g} on average and at most {difference.max:.3g}, where "
                f"{difference.tolerance:g} is tolerated"
                for push, difference in apart
            )
            raise errors.failed_precondition(
                "SAMPLER_DISAGREES",
                f"version {number} of adapter {self._adapter_id!r} was not published: samplers differ from the trainer "
                f"in the log-probabilities of the probe: {findings}. The version before it stays current everywhere",
                adapter_id=self._adapter_id,
                version=number,
                samplers=",".join(push.replica.address for push, _ in apart),
                mean_difference=max(difference.mean for _, difference in apart),
            )

    def _difference(self, push: _Push) -> Difference | None:
        return self._probe.compare(push.logprobs, push.replica.dtype) if self._probe and push.logprobs else None

    def _refusal(self, number: int, pushes: Sequence[_Push]) -> ServiceError:
        """With the status, reason and metadata of the first sampler that refused; PUSH_FAILED when all were lost."""
        failed = [push for push in pushes if push.failure]
        refusals = [push.failure for push in failed if push.failure and _is_refusal(push.failure)]
        message = (
            f"version {number} of adapter {self._adapter_id!r} was not published: {len(failed)} of {len(pushes)} "
            f"samplers failed ({_listed(failed)}). The version before it stays current everywhere; sync again when "
            "that is mended"
        )
        names = _addresses(failed)
        if not refusals:
            return errors.unavailable("PUSH_FAILED", message, adapter_id=self._adapter_id, samplers=names)
        refusal = refusals[0]
        return ServiceError(Code[refusal.code.name], refusal.reason, message, **refusal.metadata, samplers=names)

    def _unanswered(self, number: int) -> ServiceError:
        """Of a sampler that is alone: only its answer to COMMIT would say that it could install the version."""
        lost = [push for push in self._pushes if push.failure]
        return errors.unavailable(
            "PUSH_FAILED",
            f"version {number} of adapter {self._adapter_id!r} may be live: the only sampler has not answered COMMIT "
            f"({_listed(lost)}). The trainer looks what it has; sync again",
            adapter_id=self._adapter_id,
            version=number,
            samplers=_addresses(lost),
        )

    def _outcome(self, push: _Push) -> ReplicaOutcome:
        state = ReplicaState.DOWN
        if push.committed:
            state = ReplicaState.ALREADY_LIVE if push.live else ReplicaState.COMMITTED
        return ReplicaOutcome(
            address=push.replica.address,
            state=state,
            sent_bytes=self._snapshot.manifest.size_bytes if state is ReplicaState.COMMITTED else 0,
            seconds=push.seconds,
            error=str(push.failure or ""),
            difference=self._difference(push) if push.committed else None,
            transport=self._used(push) if state is ReplicaState.COMMITTED else Transport.UNSPECIFIED,
            no_cuda_ipc=push.no_cuda_ipc,
        )

    def _used(self, push: _Push) -> Transport:
        return Transport.CUDA_IPC if push.memory_id else Transport.GRPC


def _is_refusal(failure: TinkerbellError) -> bool:
    """Whether the sampler itself has answered so; otherwise it may have done what it was asked for."""
    return bool(failure.reason) and not is_down(failure)


def _nobody_there(adapter_id: str, pushes: Sequence[_Push]) -> ServiceError:
    return errors.unavailable(
        "SAMPLER_UNREACHABLE",
        f"no sampler can be reached ({_listed(pushes) or 'none is known'}); adapter {adapter_id!r} was not published, "
        "and the next SyncAdapter will try again",
        adapter_id=adapter_id,
        sampler=_addresses(pushes),
    )


def _addresses(pushes: Sequence[_Push]) -> str:
    return ",".join(push.replica.address for push in pushes)


def _listed(pushes: Sequence[_Push]) -> str:
    return "; ".join(f"{push.replica.address}: {push.failure}" for push in pushes)
