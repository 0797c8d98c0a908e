"""Answers that are kept, so that a repeated request is answered without doing it again."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf import message_factory
from google.protobuf.message import Message

from service_common import errors
from service_common.errors import Code, ServiceError
from tinkerbell.v1 import trainer_pb2
from trainer_service.order import NotBegun

MAX_REQUEST_ID_LENGTH = 128

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Reply:
    """One kept answer, as checkpoints store it."""

    request_id: str
    body_digest: str  # hex SHA-256 of the request's `body`
    method: str  # full name of the response message; empty for an error
    content: bytes  # the serialized response; for an error, JSON of ServiceError's attributes


def body(request: Message) -> bytes:
    """What makes two requests the same: type and content. Some types differ in nothing but their names."""
    return request.DESCRIPTOR.full_name.encode() + b"\0" + request.SerializeToString(deterministic=True)


class Answers:
    """The answers to the mutations of one adapter, or of the trainer itself.

    Keeps the last `limit` that are finished. `replies` are those of a checkpoint, oldest first. Before this object is
    dropped, `wait_idle`: it holds the only strong references to what it runs.
    """

    def __init__(self, replies: Iterable[Reply] = (), limit: int = 256):
        self._limit = limit
        self._kept = {reply.request_id: reply for reply in replies}
        self._running: dict[str, tuple[str, asyncio.Task[Any]]] = {}  # by request_id: body digest, task
        self._tasks: set[asyncio.Task[Any]] = set()  # those without a request_id too

    async def once[T: Message](self, request_id: str, body: bytes, work: Callable[[], Awaitable[T]]) -> T:
        """Runs `work` for the first call with this id and answers every later one with the same response or error.

        `work` runs in a task of its own, to its end also when all callers are cancelled. An empty id runs it and keeps
        nothing. Errors that are not ServiceErrors, and NotBegun, reach those who wait and are not kept: the same
        request may come again.

        FAILED_PRECONDITION when the id came with another body, INVALID_ARGUMENT when it is too long.
        """
        if len(request_id) > MAX_REQUEST_ID_LENGTH:
            raise errors.invalid_argument(
                "REQUEST_ID_INVALID",
                f"the request_id has {len(request_id)} characters; at most {MAX_REQUEST_ID_LENGTH} are possible",
                field="request_id",
                length=len(request_id),
                max_length=MAX_REQUEST_ID_LENGTH,
            )
        digest = hashlib.sha256(body).hexdigest()
        if kept := self._kept.get(request_id):
            _check_same(request_id, kept.body_digest, digest)
            return _unpack(kept)
        if running := self._running.get(request_id):
            _check_same(request_id, running[0], digest)
            return await asyncio.shield(running[1])
        task = asyncio.create_task(self._run(request_id, digest, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if request_id:
            self._running[request_id] = digest, task
        return await asyncio.shield(task)

    def saved(self) -> list[Reply]:
        """The finished answers, oldest first."""
        return list(self._kept.values())

    async def wait_idle(self) -> None:
        """Waits until nothing runs any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run[T: Message](self, request_id: str, digest: str, work: Callable[[], Awaitable[T]]) -> T:
        try:
            response = await work()
        except NotBegun:
            raise
        except ServiceError as error:
            self._keep(Reply(request_id, digest, "", json.dumps(_attributes(error)).encode()))
            raise
        except Exception:
            log.exception("operation_failed", request_id=request_id)  # perhaps nobody waits who would report it
            raise
        else:
            self._keep(Reply(request_id, digest, response.DESCRIPTOR.full_name, response.SerializeToString()))
            return response
        finally:
            self._running.pop(request_id, None)

    def _keep(self, reply: Reply) -> None:
        if reply.request_id:
            self._kept[reply.request_id] = reply
            if len(self._kept) > self._limit:
                del self._kept[next(iter(self._kept))]


def _check_same(request_id: str, first_digest: str, digest: str) -> None:
    if digest != first_digest:
        raise errors.failed_precondition(
            "REQUEST_ID_REUSED",
            f"request_id {request_id!r} came with another request before; a new request needs a new id",
            request_id=request_id,
        )


def _attributes(error: ServiceError) -> dict[str, Any]:
    return {
        "code": error.code.value,
        "reason": error.reason,
        "message": error.message,
        "field": error.field,
        "metadata": error.metadata,
    }


def _unpack(reply: Reply) -> Any:
    if reply.method:
        response_type = trainer_pb2.DESCRIPTOR.pool.FindMessageTypeByName(reply.method)
        return message_factory.GetMessageClass(response_type).FromString(reply.content)
    error = json.loads(reply.content)
    raise ServiceError(
        Code(error["code"]), error["reason"], error["message"], field=error["field"], **error["metadata"]
    )
