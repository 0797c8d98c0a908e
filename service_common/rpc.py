"""Serving over gRPC: limits, health, reflection, channelz, the error mapping and the drain on SIGTERM."""

import asyncio
import contextlib
import datetime
import signal
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from service_common.allocator import keep_freed_memory
from service_common.errors import ServiceError

ERROR_DOMAIN = "tinkerbell"
MAX_MESSAGE_BYTES = 64 << 20  # a Forward of a million tokens takes 12 MiB; adapter payloads come in chunks

_SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share its calls
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),  # clients ping every 60 s
    ("grpc.keepalive_permit_without_calls", 1),
]

log = structlog.get_logger(__name__)


def status_of(error: ServiceError) -> status_pb2.Status:
    """The google.rpc.Status: ErrorInfo; BadRequest where a field is to blame; RetryInfo where waiting helps."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.value), message=error.message)
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_seconds is not None:
        delay = datetime.timedelta(seconds=error.retry_seconds)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Answers a ServiceError with its status and any other exception with a bare INTERNAL, which it logs."""

    async def intercept_service(self, continuation, handler_call_details):
        """Wraps the method's handler, whichever of the four kinds it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.response_streaming:
            inner_stream = handler.unary_stream or handler.stream_stream

            async def stream(request, context):
                async with _mapped_errors(method, context):
                    async for response in inner_stream(request, context):
                        yield response

            behavior: Callable = stream
        else:
            inner = handler.unary_unary or handler.stream_unary

            async def unary(request, context):
                async with _mapped_errors(method, context):
                    return await inner(request, context)

            behavior = unary
        if method.startswith("/grpc."):  # health, reflection and channelz abort by themselves
            return handler
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
        return make_handler(
            behavior,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


@contextlib.asynccontextmanager
async def _mapped_errors(method: str, context: grpc.aio.ServicerContext):
    try:
        yield
    except ServiceError as error:
        log.info("rpc_refused", method=method, code=error.code.value, reason=error.reason, message=error.message)
        status = rpc_status.to_status(status_of(error))
        context.set_trailing_metadata(status.trailing_metadata)
        await context.abort(status.code, status.details)
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("rpc_failed", method=method)
        await context.abort(grpc.StatusCode.INTERNAL, f"{method} failed unexpectedly; the service's log has the cause")


class Server:
    """A gRPC server that is alive at once, ready when told so, and drains on SIGTERM or SIGINT.

    Health: the empty name answers liveness, the service's full name readiness.
    """

    def __init__(self, listen: str, service_name: str, add_service: Callable[[grpc.aio.Server], None]):
        """`listen`: HOST:PORT; `add_service` registers the servicer."""
        keep_freed_memory()
        self._service_name = service_name
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_SERVER_OPTIONS)
        add_service(self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)
        channelz_name = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
        names = (service_name, health.SERVICE_NAME, channelz_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._listen = listen

    async def start(self) -> None:
        """Binds the port. RuntimeError when it is taken."""
        port = self._server.add_insecure_port(self._listen)
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(self._service_name, health_pb2.HealthCheckResponse.NOT_SERVING)
        log.info("listening", address=f"{self._listen.rpartition(':')[0]}:{port}")

    async def set_ready(self) -> None:
        """Readiness on."""
        await self._health.set(self._service_name, health_pb2.HealthCheckResponse.SERVING)
        log.info("ready")

    async def drain(self, grace_seconds: float) -> None:
        """Readiness off, no new calls, running ones get `grace_seconds` to finish."""
        log.info("draining", grace_seconds=grace_seconds)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)
        log.info("stopped")


async def until_signal(signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
    """Returns when one of the signals comes."""
    received = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, received.set)
    await received.wait()
