"""The command line."""

import enum
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from service_common import logs


class Device(enum.StrEnum):
    """Where the model lives."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def run(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub name of the base model. Without it, call InitializeBaseModel."),
    ] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT. Loopback unless told otherwise.")] = "127.0.0.1:50051",
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT of a sampler to publish adapters to, or dns:HOST:PORT for all addresses of HOST. Can be "
            "given several times."
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="auto: cuda where there is a GPU. float32 on a CPU, bfloat16 on a GPU.")
    ] = Device.AUTO,
    cuda_ipc: Annotated[
        bool,
        typer.Option(
            help="Let samplers on this host, if they were started with --cuda-ipc as well, read weights out of GPU "
            "memory. Has no effect on a CPU."
        ),
    ] = False,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank that an adapter may have.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in one request.")] = 65536,
    max_pass_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one pass through the model; larger requests take several.")
    ] = 4096,
    max_adapters: Annotated[int, typer.Option(min=1, help="Most adapters that may exist.")] = 1024,
    max_resident_adapters: Annotated[
        int, typer.Option(min=1, help="Most adapters in the device's memory; the others wait in host memory.")
    ] = 64,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints. A restart restores adapters from their last ones.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="HOST:PORT on which to serve Prometheus metrics.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks that share every layer.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="Stages, each with its own layers.")] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option(help="Ranks that share a layer also share the tokens between its parts.")
    ] = False,
    recompute_activations: Annotated[
        bool, typer.Option(help="Compute activations again for the backward pass, which saves most of their memory.")
    ] = False,
    command_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a rank is taken to hang and the group ends.")
    ] = 600.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long running calls may go on after SIGTERM.")] = 20.0,
) -> None:
    """Serves a frozen base model and trains LoRA adapters on it.

    Under torchrun the ranks that tensor and pipeline parallelism leave hold copies of the model (data parallelism).
    """
    logs.configure("trainer")
    # How long threads that wait for work spin before they sleep, some 30 microseconds. Small matrix products take twice
    # as long when threads sleep at once; spinning for long, they take the cores from a sampler on the same host.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if device is Device.CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Megatron puts some tensors on a GPU wherever it sees one
    import torch  # noqa: PLC0415  (so that --help is quick)

    from trainer_service import service  # noqa: PLC0415
    from trainer_service.engine import Limits  # noqa: PLC0415
    from trainer_service.parallel import Layout  # noqa: PLC0415

    if device is Device.AUTO:
        device = Device.CUDA if torch.cuda.is_available() else Device.CPU
    config = service.TrainerConfig(
        model=model,
        listen=listen,
        samplers=sampler or [],
        metrics=metrics,
        checkpoints=checkpoints,
        device=device.value,
        cuda_ipc=cuda_ipc,
        limits=Limits(
            max_rank=max_rank,
            max_batch_tokens=max_batch_tokens,
            max_pass_tokens=max_pass_tokens,
            max_adapters=max_adapters,
            max_resident_adapters=max_resident_adapters,
        ),
        layout=Layout(tensor_parallel, pipeline_parallel, sequence_parallel),
        recompute_activations=recompute_activations,
        drain_seconds=drain_seconds,
        command_timeout=command_timeout,
    )
    sys.exit(service.run(config))


def main() -> None:
    """Parses the command line and serves until SIGTERM."""
    typer.run(run)
