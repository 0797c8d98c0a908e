"""What a call can raise.

A service answers with a canonical gRPC status; each has its exception here, and all of them are a `TinkerbellError`.

| status              | exception                 | what to do                                                         |
|---------------------|---------------------------|--------------------------------------------------------------------|
| INVALID_ARGUMENT    | `InvalidArgumentError`    | correct the request: it can never succeed as it is                 |
| NOT_FOUND           | `NotFoundError`           | check the id; the adapter or version is not, or no longer, there   |
| ALREADY_EXISTS      | `AlreadyExistsError`      | choose another id or version, or go on with the one that exists    |
| FAILED_PRECONDITION | `FailedPreconditionError` | change the state that the message names, then call again           |
| RESOURCE_EXHAUSTED  | `ResourceExhaustedError`  | stay below the limit that the message names, or wait               |
| ABORTED             | `AbortedError`            | another operation got in the way: do the whole operation again     |
| UNAVAILABLE         | `UnavailableError`        | check the address and that the service runs; wait, then call again |
| DEADLINE_EXCEEDED   | `DeadlineExceededError`   | allow more time; the operation may have happened all the same      |
| DATA_LOSS           | `DataLossError`           | transfer again: the bytes were damaged on the way                  |
| CANCELLED           | `CallCancelledError`      | the service gave the call up; call again if you still want it      |
| UNAUTHENTICATED     | `UnauthenticatedError`    | present credentials                                                |
| PERMISSION_DENIED   | `PermissionDeniedError`   | ask whoever runs the service                                       |
| UNIMPLEMENTED       | `UnimplementedError`      | upgrade the service: it is older than this client                  |
| INTERNAL            | `InternalError`           | read the service's log: this is a bug                              |
| any other           | `TinkerbellError`         | read the message                                                   |

`reason` names the cause for programs, in UPPER_SNAKE_CASE, and `metadata` holds the values that the message mentions.
Both are empty when the status does not come from a Tinkerbell service: a refused connection, an expired deadline.
`retry_seconds` is set where the same call may succeed after that time, such as SAMPLER_FULL; else it is None.

A call that got no answer (UNAVAILABLE without a reason) has been sent again for as long as `tinkerbell.Retry` allows
before it raises; an answer with a reason is never asked for twice. These reasons of FAILED_PRECONDITION end a
`TrainingRun`, since its numbers are not the trainer's any more; `trainer.training_run(adapter_id)` gives a new one at
the right place:

| reason               | what has happened                                                                            |
|----------------------|----------------------------------------------------------------------------------------------|
| OPERATION_UNANSWERED | an operation got no answer to any attempt (raised by the client itself)                      |
| SEQ_ID_USED          | the number was used before: another run works on the same adapter                            |
| SEQ_ID_GAP           | the operation waited for one before it, which never came                                     |
| ADAPTER_RESTORED     | the trainer restarted, and the adapter stands at `metadata["step"]`: repeat what came after  |

REQUEST_ID_REUSED, which this client does not cause, says that two different requests carried one request_id.

Arguments that the client itself can see to be wrong raise ValueError or TypeError, and nothing is sent.
"""

from collections.abc import Mapping

import grpc
from google.protobuf.message import DecodeError

from tinkerbell import _rich_status


class TinkerbellError(Exception):
    """A call failed."""

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    """The canonical status."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_seconds: float | None = None,
    ):
        """`message`: a sentence for people. `code`: absent means the class's own."""
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]" if self.reason else self.message


class InvalidArgumentError(TinkerbellError):
    """The request can never succeed as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(TinkerbellError):
    """The thing that the request names does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(TinkerbellError):
    """The thing that the request would create exists, and is different."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPreconditionError(TinkerbellError):
    """The request may succeed after the state has been changed."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhaustedError(TinkerbellError):
    """A limit is reached."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class AbortedError(TinkerbellError):
    """Another operation got in the way."""

    code = grpc.StatusCode.ABORTED


class UnavailableError(TinkerbellError):
    """The service, or something it depends on, cannot be reached now."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(TinkerbellError):
    """The client's timeout ran out. The operation may have happened."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DataLossError(TinkerbellError):
    """The bytes that came are not the bytes that were sent."""

    code = grpc.StatusCode.DATA_LOSS


class CallCancelledError(TinkerbellError):
    """The service gave the call up. (A call that *you* cancel raises the future's own CancelledError.)"""

    code = grpc.StatusCode.CANCELLED


class UnauthenticatedError(TinkerbellError):
    """The call carries no valid credentials."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(TinkerbellError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class UnimplementedError(TinkerbellError):
    """The service does not know this call."""

    code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(TinkerbellError):
    """The service failed in a way that it did not expect."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE = {error.code: error for error in TinkerbellError.__subclasses__()}


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str = "the service") -> TinkerbellError:
    """The typed exception for a failed call. `peer` names the other side where gRPC's own text does not."""
    details = _rich_status.Details()
    for key, value in error.trailing_metadata() or ():
        if key == _rich_status.TRAILER and isinstance(value, bytes):
            try:
                details = _rich_status.details(value)
            except DecodeError:
                break  # not a google.rpc.Status: the code and the text are still right
    code = error.code()
    message = error.details() or code.name
    if not details.reason:
        message = f"{peer}: {message}"
    return _BY_CODE.get(code, TinkerbellError)(
        message, code=code, reason=details.reason, metadata=details.metadata, retry_seconds=details.retry_seconds
    )
