"""The numbers of one adapter's operations."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

from tinkerbell import errors
from tinkerbell._connection import MAX_MESSAGE_BYTES

# Statuses that gRPC makes up itself when the trainer does not answer.
_NO_ANSWER = (errors.UnavailableError, errors.DeadlineExceededError, errors.CallCancelledError)
# Answers after which this run's numbers are not the trainer's.
_OUT_OF_STEP = {"SEQ_ID_USED", "SEQ_ID_GAP", "ADAPTER_RESTORED"}


class OperationOrder:
    """Numbers operations as the program calls them, from any thread.

    The trainer runs an adapter's operations in the order of their numbers and waits for a number that is missing. So a
    number must not be spent on a request that can't be sent, and once a request got no answer to any attempt, and so
    may never have arrived, nothing more is numbered: a later operation could wait forever.
    """

    def __init__(self, adapter_id: str, next_seq_id: int):
        self._adapter_id = adapter_id
        self._next = next_seq_id
        self._lost: errors.FailedPreconditionError | None = None
        self._unfinished: dict[int, asyncio.Event] = {}
        self._lock = threading.Lock()

    def number(self, request: Any) -> None:
        """Sets the request's seq_id. Call it last: the request must be sent now.

        ValueError when the request is too large to be sent; FailedPreconditionError when the order is lost.
        """
        _check_size(request)
        with self._lock:
            self._check_known()
            request.seq_id = self._next
            self._next += 1

    def number_pair(self, first: Any, second: Any) -> None:
        """Numbers two requests in a row, where only the first is sent now.

        The second, which has its final size, is sent after `finish_pair`. Operations that are numbered after it are
        held back until then: the trainer gives an operation up when one before it does not come in time.
        """
        _check_size(first)
        _check_size(second)
        with self._lock:
            self._check_known()
            first.seq_id, second.seq_id = self._next, self._next + 1
            self._next += 2
            self._unfinished[second.seq_id] = asyncio.Event()

    def finish_pair(self, seq_id: int) -> None:
        """The second request of a pair is about to be sent, or never will be. Called on the event loop."""
        with self._lock:
            self._unfinished.pop(seq_id).set()

    def abandon_pair(self, seq_id: int) -> None:
        """Nothing will be sent under the number of a pair's second request: what was numbered after it cannot run."""
        self._lose(seq_id)
        self.finish_pair(seq_id)

    @contextlib.asynccontextmanager
    async def sending(self, request: Any) -> AsyncIterator[None]:
        """Around the call with a numbered request, all attempts together: notes what becomes of the order."""
        with self._lock:
            before = [event for seq_id, event in self._unfinished.items() if seq_id < request.seq_id]
        try:
            for event in before:
                await event.wait()
            self._check_known()
            yield
        except asyncio.CancelledError:
            self._lose(request.seq_id)
            raise
        except errors.FailedPreconditionError as error:
            if error.reason in _OUT_OF_STEP:
                self._lost = error
            raise
        except _NO_ANSWER as error:
            if not error.reason:
                self._lose(request.seq_id)
            raise

    def _lose(self, seq_id: int) -> None:
        self._lost = errors.FailedPreconditionError(
            f"operation {seq_id} on adapter {self._adapter_id!r} got no answer, so its order is not known any more; "
            "go on with a new run from TrainerClient.training_run",
            reason="OPERATION_UNANSWERED",
            metadata={"adapter_id": self._adapter_id, "seq_id": str(seq_id)},
        )

    def _check_known(self) -> None:
        if self._lost is not None:
            raise errors.FailedPreconditionError(
                self._lost.message, reason=self._lost.reason, metadata=self._lost.metadata
            )


def _check_size(request: Any) -> None:
    size = request.ByteSize()
    if size > MAX_MESSAGE_BYTES - 16:  # room for the seq_id itself
        raise ValueError(f"the request takes {size} bytes, and {MAX_MESSAGE_BYTES} is the most; send less data")
