"""The order of operations on one adapter.

Clients pipeline: they send operation n + 1 before n has answered, and calls of one connection may overtake each other.
So each operation carries its number, and waits here for its turn. Different adapters never wait for each other.
"""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator

from service_common import errors
from service_common.errors import ServiceError


class NotBegun(ServiceError):
    """The operation was refused before its turn: it did nothing and did not use its number up."""

    def __init__(self, cause: ServiceError):
        super().__init__(cause.code, cause.reason, cause.message, field=cause.field, **cause.metadata)


class Turn:
    """The right to go next, held inside `Turns.take`."""

    def __init__(self, turns: "Turns", held: bool):
        self._turns = turns
        self._held = held

    def pass_on(self) -> None:
        """Lets the next operation begin before this one has ended."""
        if self._held:
            self._held = False
            self._turns._pass_on()


class Turns:
    """Hands out the turns of one adapter in the order of `seq_id`.

    `next_seq_id` is the number of the next operation to begin. `restored_step` is given for an adapter that a
    restarted trainer took from a checkpoint; see `take`.
    """

    def __init__(
        self,
        adapter_id: str,
        next_seq_id: int = 1,
        restored_step: int | None = None,
        gap_seconds: float = 60.0,
        overtaking_seconds: float = 2.0,
    ):
        self.next_seq_id = next_seq_id
        self._adapter_id = adapter_id
        self._restored_step = restored_step
        self._gap_seconds = gap_seconds
        self._overtaking_seconds = overtaking_seconds  # by which calls that were sent together may come apart
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._waiting_alone: collections.deque[asyncio.Future[None]] = collections.deque()
        self._held = False  # by an operation that has not passed its turn on
        self._alone_was_last = False
        self._running = 0  # operations that have begun, numbered or not
        self._idle = asyncio.Event()
        self._idle.set()
        self._clock: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def take(self, seq_id: int, *, alone: bool = False) -> AsyncIterator[Turn]:
        """Waits until all operations with lower numbers have ended; `seq_id` 0 does not wait.

        With `alone` it does: an operation that looks at the adapter more than once goes between two numbered ones. The
        two kinds take turns, so that neither can keep the other one waiting for long.

        The number is used up once the block begins, however it ends. The task that waits here must not be cancelled;
        `idempotency.Answers` gives every operation a task of its own.

        Raises NotBegun: SEQ_ID_USED for a number that came before; SEQ_ID_GAP when a lower number is missing and for
        `gap_seconds` no operation of the adapter ran or arrived; ADAPTER_RESTORED, after `overtaking_seconds`, for
        a number beyond the next while no operation has begun since the adapter was restored, since those between
        went down with the old trainer; ADAPTER_NOT_FOUND when the adapter is removed while waiting.
        """
        if seq_id:
            await self._wait_for(seq_id)
        elif alone:
            await self._wait_alone()
        else:
            self._begin()
        self._restored_step = None
        self._restart_clock()
        turn = Turn(self, held=alone or seq_id > 0)
        try:
            yield turn
        finally:
            turn.pass_on()
            self._running -= 1
            if not self._running:
                self._idle.set()
            self._restart_clock()

    async def wait_idle(self) -> None:
        """Waits until no operation runs."""
        await self._idle.wait()

    def close(self) -> None:
        """Fails everybody who waits: the adapter is gone."""
        for future in (*self._waiting.values(), *self._waiting_alone):
            removed = errors.not_found(
                "ADAPTER_NOT_FOUND",
                f"adapter {self._adapter_id!r} was removed while the operation waited for its turn",
                adapter_id=self._adapter_id,
            )
            future.set_exception(NotBegun(removed))
        self._waiting.clear()
        self._waiting_alone.clear()
        self._restart_clock()

    async def _wait_for(self, seq_id: int) -> None:
        if seq_id < self.next_seq_id or seq_id in self._waiting:
            used = errors.failed_precondition(
                "SEQ_ID_USED",
                f"seq_id {seq_id} of adapter {self._adapter_id!r} was used already; the next one is {self.next_seq_id}",
                adapter_id=self._adapter_id,
                seq_id=seq_id,
                next_seq_id=self.next_seq_id,
            )
            raise NotBegun(used)
        future = asyncio.get_running_loop().create_future()
        self._waiting[seq_id] = future
        self._begin_next()
        self._restart_clock()
        await future

    async def _wait_alone(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting_alone.append(future)
        self._begin_next()
        await future

    def _pass_on(self) -> None:
        self._held = False
        self._begin_next()

    def _begin_next(self) -> None:
        if self._held:
            return
        is_alone = bool(self._waiting_alone) and not (self._alone_was_last and self.next_seq_id in self._waiting)
        if is_alone:
            future = self._waiting_alone.popleft()
        elif self.next_seq_id in self._waiting:
            future = self._waiting.pop(self.next_seq_id)
            self.next_seq_id += 1
        else:
            return
        self._held, self._alone_was_last = True, is_alone
        self._begin()
        future.set_result(None)

    def _begin(self) -> None:
        self._running += 1
        self._idle.clear()

    def _restart_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        if self._waiting and not self._running:
            patience = self._gap_seconds if self._restored_step is None else self._overtaking_seconds
            self._clock = asyncio.get_running_loop().call_later(patience, self._give_up)

    def _give_up(self) -> None:
        for seq_id, future in self._waiting.items():
            future.set_exception(NotBegun(self._gap(seq_id) if self._restored_step is None else self._restored(seq_id)))
        self._waiting.clear()

    def _gap(self, seq_id: int) -> ServiceError:
        return errors.failed_precondition(
            "SEQ_ID_GAP",
            f"operation {seq_id} of adapter {self._adapter_id!r} waits for operation {self.next_seq_id}, which did "
            f"not come within {self._gap_seconds:g} s; send {self.next_seq_id} first, then {seq_id} again",
            adapter_id=self._adapter_id,
            seq_id=seq_id,
            next_seq_id=self.next_seq_id,
        )

    def _restored(self, seq_id: int) -> ServiceError:
        return errors.failed_precondition(
            "ADAPTER_RESTORED",
            f"operation {seq_id} cannot follow: the trainer restarted; adapter {self._adapter_id!r} stands at step "
            f"{self._restored_step}, next operation is {self.next_seq_id}; take a new training run from there",
            adapter_id=self._adapter_id,
            seq_id=seq_id,
            next_seq_id=self.next_seq_id,
            step=self._restored_step,
        )
