"""The sampler's life: listen, load, serve, drain, end."""

import asyncio
import functools
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import prometheus_client
import structlog

from sampler_service.config import SamplerConfig
from sampler_service.lanes import Lanes
from sampler_service.sampler import Sampler
from sampler_service.server import SERVICE_NAME, SamplerServicer, add_to_server
from sampler_service.tokenizer import Tokenizer
from service_common import checkpoint, rpc
from service_common.errors import ServiceError

if TYPE_CHECKING:
    from sampler_service.engine import Engine
    from sampler_service.openai_http import HttpServer

log = structlog.get_logger(__name__)


async def serve(config: SamplerConfig, listen: str, http: str | None, metrics: str | None, drain_seconds: float) -> int:
    """Serves until a signal comes or vLLM dies, and leaves no process behind.

    listen, http, metrics: HOST:PORT of the service, OpenAI's API and Prometheus metrics. HTTP connections are refused
    until the service is ready. OSError when one of the latter two addresses is taken.
    Returns the exit status: 0 after a signal, 1 when the model cannot be loaded or vLLM has died.
    """
    lanes = Lanes(listen.rpartition(":")[0])
    lanes.running()  # they start meanwhile
    try:
        return await _serve(config, lanes, listen, http, metrics, drain_seconds)
    finally:
        await lanes.close()


async def _serve(
    config: SamplerConfig, lanes: Lanes, listen: str, http: str | None, metrics: str | None, drain_seconds: float
) -> int:
    servicer = SamplerServicer()
    server = rpc.Server(listen, SERVICE_NAME, functools.partial(add_to_server, servicer))
    listener = _bound(http) if http else None
    if metrics:
        host, _, port = metrics.rpartition(":")
        prometheus_client.start_http_server(int(port), host)
    signalled = asyncio.create_task(rpc.until_signal())
    await server.start()
    loading = asyncio.create_task(_load(config, lanes, listener))
    await asyncio.wait((signalled, loading), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        await server.drain(0)
        await _abandon(loading)
        return 0
    try:
        sampler, engine, http_servers = loading.result()
    except Exception as error:
        log.error("load_failed", model=config.model, error=str(error), exc_info=not isinstance(error, ServiceError))
        await server.drain(0)
        return 1
    servicer.attach(sampler)
    counting = asyncio.create_task(_count(sampler, engine))
    died = asyncio.create_task(_until_dead(engine))
    if config.await_trainer:
        log.info("awaiting_trainer")
        current = asyncio.create_task(sampler.current.wait())
        await asyncio.wait((signalled, died, current), return_when=asyncio.FIRST_COMPLETED)
    if not (signalled.done() or died.done()):
        for each in http_servers:
            await each.start()
        await server.set_ready()
        await asyncio.wait((signalled, died), return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        log.error("engine_died")
    sampler.device_memory.ending.set()
    grace_seconds = 0 if died.done() else drain_seconds
    await asyncio.gather(server.drain(grace_seconds), *(each.drain(grace_seconds) for each in http_servers))
    counting.cancel()
    engine.shutdown()
    return 1 if died.done() else 0


async def _load(
    config: SamplerConfig, lanes: Lanes, listener: socket.socket | None
) -> "tuple[Sampler, Engine, Sequence[HttpServer]]":
    sampler, engine = await asyncio.to_thread(_start, config, lanes)
    try:
        await engine.prove()
        http_servers = [await asyncio.to_thread(_http_server, listener, sampler, engine)] if listener else []
    except BaseException:
        engine.shutdown()
        raise
    return sampler, engine, http_servers


async def _count(sampler: Sampler, engine: "Engine") -> None:
    from sampler_service.metrics import Metrics  # noqa: PLC0415  as in `_start`

    await Metrics(sampler, engine).count()


def _bound(address: str) -> socket.socket:
    """The port is taken from now on, and who connects is refused until something listens."""
    host, _, port = address.rpartition(":")
    family, kind, *_, resolved = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(resolved)
    return bound


def _http_server(listener: socket.socket, sampler: Sampler, engine: "Engine") -> "HttpServer":
    from sampler_service.openai_http import HttpServer  # noqa: PLC0415  as in `_start`

    return HttpServer(listener, sampler, engine)


def _start(config: SamplerConfig, lanes: Lanes) -> "tuple[Sampler, Engine]":
    # Importing vLLM takes ten seconds, in which the server answers already.
    from sampler_service.engine import Engine  # noqa: PLC0415

    base = checkpoint.resolve(config.model)
    tokenizer = Tokenizer(base.folder)
    engine = Engine(config, base, has_tokenizer=tokenizer.present)
    return Sampler(config, base, engine, tokenizer, lanes), engine


async def _abandon(loading: asyncio.Task) -> None:
    """Ends a load that nobody waits for. A thread cannot be stopped, but what it waits for can."""
    from sampler_service.engine import kill_starting_engine  # noqa: PLC0415  as above

    while not loading.done():
        kill_starting_engine()
        await asyncio.wait((loading,), timeout=0.2)
    if not loading.exception():  # it had just become ready
        loading.result()[1].shutdown()


async def _until_dead(engine: "Engine") -> None:
    while not engine.dead:  # noqa: ASYNC110  vLLM sets no event
        await asyncio.sleep(1)
