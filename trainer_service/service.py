"""The trainer's life: listen, load, serve, drain, end."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import prometheus_client
import structlog

from service_common import rpc
from service_common.errors import ServiceError
from tinkerbell.v1 import trainer_pb2, trainer_pb2_grpc
from trainer_service.checkpoints import CheckpointStore
from trainer_service.engine import Engine, Limits
from trainer_service.executor import Executor, LocalExecutor
from trainer_service.metrics import Metrics
from trainer_service.parallel import Layout
from trainer_service.publish.discovery import Discovery
from trainer_service.publish.publisher import Publisher
from trainer_service.publish.relays import Relays
from trainer_service.ranks import Group, Process, RanksExecutor, follow
from trainer_service.server import TrainerServicer
from trainer_service.trainer import Trainer

log = structlog.get_logger(__name__)

SERVICE_NAME = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name


@dataclass(frozen=True)
class TrainerConfig:
    """The trainer's settings; `cli.py` has their defaults.

    model: checkpoint folder or hub name, None to wait for InitializeBaseModel.
    listen, metrics: HOST:PORT; None for no metrics.
    samplers: as Discovery takes them; none for a trainer that publishes nowhere.
    checkpoints: folder for checkpoints, None for none.
    device: "cpu" or "cuda".
    cuda_ipc: whether samplers on the same host may read weights out of GPU memory.
    command_timeout: seconds after which a rank is taken to hang.
    """

    model: str | None
    listen: str
    samplers: Sequence[str]
    metrics: str | None
    checkpoints: Path | None
    device: str
    cuda_ipc: bool
    limits: Limits
    layout: Layout
    recompute_activations: bool
    drain_seconds: float
    command_timeout: float


def run(config: TrainerConfig) -> int:
    """Serves until a signal comes, or, on other ranks than the first, until that one ends. Returns the exit status.

    0 after a signal, 1 when the model given cannot be loaded.
    """
    process = Process.from_environment()
    config.layout.data(process.world_size)
    device = process.device(config.device)
    engine = Engine(device, config.limits, config.layout, config.recompute_activations)
    if process.world_size == 1:
        return asyncio.run(_serve(config, engine, LocalExecutor(engine)))
    group = Group(process, device, config.command_timeout)
    if process.rank:
        follow(engine, group)
        return 0
    return asyncio.run(_serve(config, engine, RanksExecutor(engine, group)))


async def _serve(config: TrainerConfig, engine: Engine, executor: Executor) -> int:
    metrics = Metrics()
    store = CheckpointStore(config.checkpoints) if config.checkpoints else None

    async def reserve(adapter_id: str, version: int) -> None:
        if store is not None:
            await asyncio.to_thread(store.mark_published, adapter_id, version)

    cuda_ipc = None
    if config.cuda_ipc and config.device == "cuda":
        from trainer_service.publish.cuda_ipc import CudaIpc  # noqa: PLC0415  (needs CUDA's library)

        cuda_ipc = CudaIpc(engine.device)
    publisher = Publisher(Discovery(config.samplers), reserve, metrics, Relays(), cuda_ipc) if config.samplers else None
    trainer = Trainer(engine, executor, metrics, publisher, store)
    servicer = TrainerServicer(trainer)
    server = rpc.Server(
        config.listen,
        SERVICE_NAME,
        lambda inner: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, inner),
    )
    signalled = asyncio.create_task(rpc.until_signal())
    loading: asyncio.Task = asyncio.create_task(trainer.loaded.wait())
    if config.model is not None:
        # Before the first request can come: those wait for adapters that are restored with the model.
        loading = asyncio.create_task(
            trainer.load_base_model(
                config.model, lambda stage: log.info("loading", model=config.model, stage=stage.lower())
            )
        )
        await asyncio.sleep(0)
    await server.start()
    if config.metrics:
        host, _, port = config.metrics.rpartition(":")
        prometheus_client.start_http_server(int(port), host, metrics.registry)
    waiting: set[asyncio.Task] = {signalled, loading}
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    status = 0
    for task in done:
        if (error := task.exception()) is not None:
            log.error("load_failed", model=config.model, error=str(error), exc_info=not isinstance(error, ServiceError))
            status = 1
    if not status and not signalled.done():
        await server.set_ready()
        await signalled
    await server.drain(config.drain_seconds)
    if trainer.loading:
        # A load can't be interrupted, holds its thread to the end, and has made nothing yet that could be lost.
        log.info("load_abandoned", model=config.model)
        os._exit(status)
    await trainer.close()
    return status
