"""What the examples share, so that each of them is its loop and little else."""

import contextlib
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import rich
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tinkerbell.local import LocalServices, free_address

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache/models/SmolLM2-135M-Instruct"  # `make demo` makes it
OUT = ROOT / "out"

TrainerAddress = Annotated[str, typer.Option("--trainer", metavar="HOST:PORT", help="A trainer that runs.")]
SamplerAddress = Annotated[
    str,
    typer.Option(
        "--sampler", metavar="HOST:PORT", help="The sampler that it publishes to. Without both, the example starts two."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Gets the plot, and the logs of services started here.")]


class Addresses(NamedTuple):
    """Where both services listen, HOST:PORT."""

    trainer: str
    sampler: str


@contextlib.contextmanager
def services(trainer: str, sampler: str, out: Path) -> Iterator[Addresses]:
    """A trainer and its sampler: those given or, given none, two that live as long as the context.

    Makes the folder `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    if trainer and sampler:
        yield Addresses(trainer, sampler)
        return
    if trainer or sampler:
        raise typer.BadParameter("give both --trainer and --sampler, or none of them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `with` below, which stops both services
    trainer, sampler = free_address(), free_address()
    local = LocalServices.for_model(
        str(MODEL), trainer_listen=trainer, sampler_listen=sampler, dtype="float32", log_dir=out / "logs"
    )
    rich.print(f"Starting both services on {MODEL.name}, a minute or two; their logs are in {local.log_dir}")
    with local:
        yield Addresses(trainer, sampler)


def new_name(name: str) -> str:
    """A name that no adapter has yet: services that run for long see an example more than once."""
    return f"{name}-{secrets.token_hex(3)}"


def progress_bar() -> Progress:
    """A bar for tasks with a field `reading`, which shows the latest figures."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[reading]}"),
        TimeElapsedColumn(),
    )
