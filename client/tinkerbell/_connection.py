"""A gRPC channel to one service: limits, keepalive, retries, deadlines and typed errors."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import grpc

from tinkerbell import errors
from tinkerbell._retry import DEFAULT_RETRY, Retry

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 << 20  # the services' own limit

# Calls that change nothing, so that asking again is safe.
_READS = {
    "tinkerbell.v1.TrainerService": [
        "GetBackendInfo",
        "ListLoraAdapters",
        "GetOptimizerState",
        "ListOptimizerStates",
        "ListCheckpoints",
        "VerifyAdapter",
    ],
    "tinkerbell.v1.SamplerService": ["GetBackendInfo", "ListAdapters", "ComputeLogprobs"],
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": service, "method": method} for service, reads in _READS.items() for method in reads],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # a training step may be silent for longer than two pings
    ("grpc.max_reconnect_backoff_ms", 5_000),  # a service that restarts is found again soon
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
]


class Connection:
    """Makes calls to one address. Belongs to the event loop it was made in."""

    def __init__(self, service: str, address: str, timeout: float | None, retry: Retry = DEFAULT_RETRY):
        """`service` names the other side in errors. `timeout`: seconds for each whole call; None means no limit."""
        asyncio.get_running_loop()  # RuntimeError now rather than a channel of another loop
        self.channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self.peer = f"{service} at {address}"
        self._timeout = timeout
        self._retry = retry
        self._tasks: set[asyncio.Task] = set()

    async def call(self, method: Any, request: Any) -> Any:
        """The response of a unary call."""
        with self._typed_errors():
            return await method(request, timeout=self._timeout)

    async def mutate(self, method: Any, request: Any) -> Any:
        """As `call`, for a request with a request_id: it is sent again while no answer comes."""

        async def attempt(timeout: float | None) -> Any:  # noqa: ASYNC109 - gRPC keeps the time
            with self._typed_errors():
                return await method(request, timeout=timeout)

        return await self.until_answered(attempt)

    async def until_answered(self, attempt: Callable[[float | None], Awaitable[T]]) -> T:
        """What `attempt` returns, which is given its seconds, and is called again while no answer comes."""
        return await self._retry.until_answered(attempt, self._timeout)

    async def stream(self, method: Any, request: Any) -> AsyncGenerator[Any, None]:
        """The responses of a streaming call. Closing the generator cancels the call."""
        with self._typed_errors():
            call = method(request, timeout=self._timeout)
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs the coroutine as a task that lives to its end even if the caller drops it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancels what is running and closes the channel."""
        await self.channel.close()

    @contextlib.contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error, self.peer) from error
        except grpc.aio.UsageError:
            raise RuntimeError(f"the connection to {self.peer} is closed") from None
