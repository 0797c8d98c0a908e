"""The command line."""

import asyncio
import enum
import os
import sys
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
    sampler: Annotated[str | None, typer.Option(help="HOST:PORT of the sampler to publish adapters to.")] = None,
    device: Annotated[
        Device, typer.Option(help="auto: cuda where there is a GPU. float32 on a CPU, bfloat16 on a GPU.")
    ] = Device.AUTO,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank that an adapter may have.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in one request.")] = 65536,
    max_pass_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one pass through the model; larger requests take several.")
    ] = 4096,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long running calls may go on after SIGTERM.")] = 30.0,
) -> None:
    """Serves a frozen base model and trains LoRA adapters on it."""
    logs.configure("trainer")
    # Threads that wait for work must sleep: spinning, they take the cores from a sampler on the same host.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch  # noqa: PLC0415  (so that --help is quick)

    from trainer_service.engine import Limits  # noqa: PLC0415
    from trainer_service.service import serve  # noqa: PLC0415

    if device is Device.AUTO:
        device = Device.CUDA if torch.cuda.is_available() else Device.CPU
    limits = Limits(max_rank=max_rank, max_batch_tokens=max_batch_tokens, max_pass_tokens=max_pass_tokens)
    sys.exit(asyncio.run(serve(model, listen, sampler, torch.device(device.value), limits, drain_seconds)))


def main() -> None:
    """Parses the command line and serves until SIGTERM."""
    typer.run(run)
