"""The status that the other side gave a streaming call.

grpc.aio loses it when the call ends while the client writes: the failed write puts a status of its own, INTERNAL
"Internal error from Core", in its place, before or after the real one has come.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc

_STAND_IN = "Internal error from Core"
_POLL_SECONDS = 0.005
_POLLS = 100


class CallStatus:
    """Watches a call that has just been made."""

    def __init__(self, call: Any):
        self._call = call
        self._first: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    async def error(self, raised: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The error to report when the call raised `raised`: the real one, unless it never comes."""
        status = self._first or raised
        for _ in range(_POLLS):
            if status.details() != _STAND_IN:
                break
            await asyncio.sleep(_POLL_SECONDS)
            status = _status(self._call)
        return status

    def _note(self, call: Any) -> None:
        # Called in the moment a status is set, so nothing can have replaced it yet.
        if not call.cancelled():
            self._first = _status(call)


def _status(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        _now(call.code()),
        _now(call.initial_metadata()),
        _now(call.trailing_metadata()),
        details=_now(call.details()),
    )


def _now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for, as those of an ended call."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        return finished.value
    raise RuntimeError("the call has not ended")
