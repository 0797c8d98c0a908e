"""The trainer's life: listen, load, serve, drain, end."""

import asyncio
import os

import structlog
import torch

from service_common import rpc
from service_common.errors import ServiceError
from tinkerbell.v1 import trainer_pb2, trainer_pb2_grpc
from trainer_service.engine import Engine, Limits
from trainer_service.executor import LocalExecutor
from trainer_service.publish.grpc_push import GrpcPublisher
from trainer_service.server import TrainerServicer
from trainer_service.trainer import Trainer

log = structlog.get_logger(__name__)

SERVICE_NAME = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name


async def serve(
    model: str | None, listen: str, sampler: str | None, device: torch.device, limits: Limits, drain_seconds: float
) -> int:
    """Serves on `listen` (HOST:PORT) until a signal comes; ready once a base model is loaded.

    Returns the exit status: 0 after a signal, 1 when the model given cannot be loaded.
    """
    engine = Engine(device, limits)
    trainer = Trainer(engine, LocalExecutor(engine), GrpcPublisher(sampler) if sampler else None)
    servicer = TrainerServicer(trainer)
    server = rpc.Server(
        listen, SERVICE_NAME, lambda inner: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, inner)
    )
    signalled = asyncio.create_task(rpc.until_signal())
    await server.start()
    loaded = asyncio.create_task(trainer.loaded.wait())
    waiting: set[asyncio.Task] = {signalled, loaded}
    if model is not None:
        loading = asyncio.create_task(
            trainer.load_base_model(model, lambda stage: log.info("loading", model=model, stage=stage.lower()))
        )
        waiting = {signalled, loading}
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    status = 0
    for task in done:
        if (error := task.exception()) is not None:
            log.error("load_failed", model=model, error=str(error), exc_info=not isinstance(error, ServiceError))
            status = 1
    if not status and not signalled.done():
        await server.set_ready()
        await signalled
    await server.drain(drain_seconds)
    if trainer.loading:
        # A load can't be interrupted, holds its thread to the end, and has made nothing yet that could be lost.
        log.info("load_abandoned", model=model)
        os._exit(status)
    await trainer.close()
    return status
