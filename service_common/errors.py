"""Errors that domain modules raise; `service_common.rpc` turns them into gRPC statuses.

Every error names its cause in `reason` (UPPER_SNAKE_CASE, stable, listed in docs/errors.md), says in its message what
was wrong with which value and what to do, and repeats the values in `metadata` for programs.
"""

import enum
from collections.abc import Iterable
from typing import Any

_MOST_LISTED = 10


class Code(enum.Enum):
    """The canonical gRPC codes in use; the values are their names in grpc.StatusCode."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    ABORTED = "ABORTED"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"


class ServiceError(Exception):
    """A failure with a known cause."""

    retry_seconds: float | None = None
    """When the same request may succeed, for google.rpc.RetryInfo, if that is known."""

    def __init__(self, code: Code, reason: str, message: str, *, field: str = "", **metadata: Any):
        """`field`: path of the offending request field, for google.rpc.BadRequest."""
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = {name: str(value) for name, value in metadata.items()}

    def within(self, part: str) -> "ServiceError":
        """The same error, of that part of a larger request, such as "requests[3]"."""
        field = f"{part}.{self.field}" if self.field else part
        error = ServiceError(self.code, self.reason, f"{part}: {self.message}", field=field, **self.metadata)
        error.retry_seconds = self.retry_seconds
        return error


def invalid_argument(reason: str, message: str, *, field: str = "", **metadata: Any) -> ServiceError:
    """The request can never succeed as it is."""
    return ServiceError(Code.INVALID_ARGUMENT, reason, message, field=field, **metadata)


def not_found(reason: str, message: str, **metadata: Any) -> ServiceError:
    """The thing that the request names does not exist."""
    return ServiceError(Code.NOT_FOUND, reason, message, **metadata)


def already_exists(reason: str, message: str, **metadata: Any) -> ServiceError:
    """The thing that the request would create exists, and is different."""
    return ServiceError(Code.ALREADY_EXISTS, reason, message, **metadata)


def failed_precondition(reason: str, message: str, **metadata: Any) -> ServiceError:
    """The request may succeed after the state has been changed."""
    return ServiceError(Code.FAILED_PRECONDITION, reason, message, **metadata)


def resource_exhausted(
    reason: str, message: str, *, retry_seconds: float | None = None, **metadata: Any
) -> ServiceError:
    """A limit is reached. `retry_seconds`: when there may be room again, if that is known."""
    error = ServiceError(Code.RESOURCE_EXHAUSTED, reason, message, **metadata)
    error.retry_seconds = retry_seconds
    return error


def aborted(reason: str, message: str, **metadata: Any) -> ServiceError:
    """Another operation got in the way; the caller may try the whole operation again."""
    return ServiceError(Code.ABORTED, reason, message, **metadata)


def unavailable(reason: str, message: str, **metadata: Any) -> ServiceError:
    """Something this service depends on cannot be reached now."""
    return ServiceError(Code.UNAVAILABLE, reason, message, **metadata)


def data_loss(reason: str, message: str, **metadata: Any) -> ServiceError:
    """The bytes that came are not the bytes that were sent."""
    return ServiceError(Code.DATA_LOSS, reason, message, **metadata)


def listed(names: Iterable[str]) -> str:
    """Names for a message, in order; only the first of many, as gRPC drops an error that takes more than 8 KiB."""
    ordered = sorted(names)
    more = len(ordered) - _MOST_LISTED
    return ", ".join(ordered[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "") or "none"
