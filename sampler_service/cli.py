"""The command line."""

import asyncio
import enum
import sys
from typing import Annotated

import typer

from sampler_service import environment
from sampler_service.config import SamplerConfig
from service_common import logs


class Dtype(enum.StrEnum):
    """Element types of the base weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def run(
    *,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name of the base model.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT. Loopback unless told otherwise.")] = "127.0.0.1:50052",
    http: Annotated[str | None, typer.Option(help="HOST:PORT of OpenAI's HTTP API, which is off if not given.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the base weights. auto: the checkpoint's own, as vLLM reads it.")
    ] = Dtype.AUTO,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share every layer.")] = 1,
    max_rank: Annotated[int, typer.Option(min=1, max=512, help="Largest rank that an adapter may have.")] = 64,
    max_loras: Annotated[int, typer.Option(min=1, help="Adapter versions that one engine step can mix.")] = 4,
    keep_versions: Annotated[
        int, typer.Option(min=1, help="Live versions kept per adapter, besides those with running requests.")
    ] = 2,
    max_sequences: Annotated[
        int,
        typer.Option(min=1, help="Completions and sequences to score that may run or wait at once; more are refused."),
    ] = 256,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest sequence in tokens. As long as the model can, if not given.")
    ] = None,
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Memory for keys and values. If not given, 1 on a CPU, and on a GPU what is left of vLLM's share.",
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Share of a GPU's memory to take, weights included. vLLM's default, if not given."
        ),
    ] = None,
    cuda_ipc: Annotated[
        bool,
        typer.Option(
            help="Read weights out of the GPU memory of a trainer on this host, if it was started with --cuda-ipc as "
            "well. Has no effect on a CPU."
        ),
    ] = False,
    await_trainer: Annotated[
        bool, typer.Option(help="Report ready only when the trainer has brought every adapter up to date.")
    ] = False,
    metrics: Annotated[str | None, typer.Option(help="HOST:PORT on which to serve Prometheus metrics.")] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long running calls may go on after SIGTERM.")] = 30.0,
) -> None:
    """Serves a base model and the LoRA adapters that are pushed to it."""
    logs.configure("sampler")
    environment.prepare()
    from sampler_service.service import serve  # noqa: PLC0415  (so that --help is quick)

    config = SamplerConfig(
        model=model,
        dtype=dtype.value,
        tensor_parallel=tensor_parallel,
        max_rank=max_rank,
        max_loras=max_loras,
        keep_versions=keep_versions,
        max_sequences=max_sequences,
        max_model_len=max_model_len,
        kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * (1 << 30)),
        gpu_memory_utilization=gpu_memory_utilization,
        cuda_ipc=cuda_ipc,
        await_trainer=await_trainer,
    )
    sys.exit(asyncio.run(serve(config, listen, http, metrics, drain_seconds)))


def main() -> None:
    """Parses the command line and serves until SIGTERM."""
    typer.run(run)
