"""The numbers of one adapter's operations."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tinkerbell import errors
from tinkerbell._connection import MAX_MESSAGE_BYTES

# Statuses that gRPC makes up itself when the trainer does not answer.
_NO_ANSWER = (errors.UnavailableError, errors.DeadlineExceededError, errors.CallCancelledError)


class OperationOrder:
    """Numbers operations as the program calls them, from any thread.

    The trainer runs an adapter's operations in the order of their numbers and waits for a number that is missing. So a
    number must not be spent on a request that can't be sent, and once a request got no answer, and so may never have
    arrived, nothing more is numbered: a later operation could wait forever.
    """

    def __init__(self, adapter_id: str, next_seq_id: int):
        self._adapter_id = adapter_id
        self._next = next_seq_id
        self._unanswered: int | None = None
        self._lock = threading.Lock()

    def number(self, request: Any) -> None:
        """Sets the request's seq_id. Call it last: the request must be sent now.

        ValueError when the request is too large to be sent; FailedPreconditionError when the order is lost.
        """
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES - 16:  # room for the seq_id itself
            raise ValueError(f"the request takes {size} bytes, and {MAX_MESSAGE_BYTES} is the most; send less data")
        with self._lock:
            if self._unanswered is not None:
                raise errors.FailedPreconditionError(
                    f"operation {self._unanswered} on adapter {self._adapter_id!r} got no answer, so its order is not "
                    "known any more; go on with a new run from TrainerClient.training_run",
                    reason="OPERATION_UNANSWERED",
                    metadata={"adapter_id": self._adapter_id, "seq_id": str(self._unanswered)},
                )
            request.seq_id = self._next
            self._next += 1

    @contextlib.contextmanager
    def sending(self, request: Any) -> Iterator[None]:
        """Around the call with a numbered request: notes when it gets no answer."""
        try:
            yield
        except asyncio.CancelledError:
            self._unanswered = request.seq_id
            raise
        except _NO_ANSWER as error:
            if not error.reason:
                self._unanswered = request.seq_id
            raise
