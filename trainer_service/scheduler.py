"""The order of operations on one adapter.

Clients pipeline: they send operation n + 1 before n has answered, and calls of one connection may overtake each other.
So each operation carries its number, and waits here for its turn. Different adapters never wait for each other.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from service_common import errors


class Turn:
    """The right to go next, held inside `Turns.take`."""

    def __init__(self, turns: "Turns", numbered: bool):
        self._turns = turns
        self._held = numbered

    def pass_on(self) -> None:
        """Lets the next operation begin before this one has ended."""
        if self._held:
            self._held = False
            self._turns._advance()


class Turns:
    """Hands out the turns of one adapter in the order of `seq_id`, from 1."""

    def __init__(self, adapter_id: str):
        self._adapter_id = adapter_id
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._abandoned: set[int] = set()
        self.next_seq_id = 1

    @contextlib.asynccontextmanager
    async def take(self, seq_id: int) -> AsyncIterator[Turn]:
        """Waits until all operations with lower numbers have ended; `seq_id` 0 does not wait.

        The number is used up when the block ends, however it ends, and also when the caller gives up waiting: later
        operations must not hang on one that will never come again. FAILED_PRECONDITION when it is used up already,
        NOT_FOUND when the adapter is removed while waiting.
        """
        if seq_id:
            await self._wait_for(seq_id)
        turn = Turn(self, numbered=seq_id > 0)
        try:
            yield turn
        finally:
            turn.pass_on()

    def close(self) -> None:
        """Fails everybody who waits: the adapter is gone."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(
                    errors.not_found(
                        "ADAPTER_NOT_FOUND",
                        f"adapter {self._adapter_id!r} was removed while the operation waited for its turn",
                        adapter_id=self._adapter_id,
                    )
                )

    async def _wait_for(self, seq_id: int) -> None:
        if seq_id < self.next_seq_id or seq_id in self._waiting or seq_id in self._abandoned:
            raise errors.failed_precondition(
                "SEQ_ID_USED",
                f"seq_id {seq_id} of adapter {self._adapter_id!r} was used already; the next one is {self.next_seq_id}",
                adapter_id=self._adapter_id,
                seq_id=seq_id,
                next_seq_id=self.next_seq_id,
            )
        future = asyncio.get_running_loop().create_future()
        self._waiting[seq_id] = future
        if seq_id == self.next_seq_id:
            future.set_result(None)
        try:
            await future
        except asyncio.CancelledError:
            del self._waiting[seq_id]
            self._abandoned.add(seq_id)
            if seq_id == self.next_seq_id:
                self._skip_abandoned()
            raise
        del self._waiting[seq_id]

    def _advance(self) -> None:
        self.next_seq_id += 1
        self._skip_abandoned()

    def _skip_abandoned(self) -> None:
        while self.next_seq_id in self._abandoned:
            self._abandoned.remove(self.next_seq_id)
            self.next_seq_id += 1
        future = self._waiting.get(self.next_seq_id)
        if future is not None and not future.done():
            future.set_result(None)
