"""What the `tinkerbell` command can do."""

import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import grpc_health.v1.health  # noqa: F401 - `up` needs it: better to fail here than after the services have started
import typer
from rich.console import Console

from tinkerbell import merge as merging
from tinkerbell.cli import render
from tinkerbell.errors import TinkerbellError
from tinkerbell.local import LocalServices, ServiceDiedError
from tinkerbell.sync import SamplerClient, TrainerClient

app = typer.Typer(
    help="Fine-tune LoRA adapters on a shared base model and sample from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()
errors = Console(stderr=True)

TrainerAddress = Annotated[str, typer.Option("--trainer", metavar="HOST:PORT", help="Where the trainer listens.")]
SamplerAddress = Annotated[str, typer.Option("--sampler", metavar="HOST:PORT", help="Where the sampler listens.")]
TRAINER = "127.0.0.1:50051"
SAMPLER = "127.0.0.1:50052"


@app.command()
def up(
    model: Annotated[str, typer.Argument(help="A folder with a Hugging Face checkpoint, or a hub name.")],
    trainer_listen: Annotated[str, typer.Option(metavar="HOST:PORT")] = TRAINER,
    sampler_listen: Annotated[str, typer.Option(metavar="HOST:PORT")] = SAMPLER,
    dtype: Annotated[
        str | None, typer.Option(help="Element type of the sampler's base weights.", show_default="its own")
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Where the services' logs go.", show_default="a temporary folder")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the services' logs here instead.")] = False,
) -> None:
    """Runs a trainer and a sampler on this machine until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    services = LocalServices.for_model(
        model,
        trainer_listen=trainer_listen,
        sampler_listen=sampler_listen,
        dtype=dtype,
        log_dir=log_dir,
        verbose=verbose,
    )
    if services.log_dir:
        console.print(f"logs: {services.log_dir}", highlight=False, soft_wrap=True)
    try:
        with render.Startup(console, services.specs) as startup:
            services.start()
            services.wait_ready(on_change=startup.update)
        console.print(render.addresses(trainer_listen, sampler_listen))
        services.wait()
    except KeyboardInterrupt:
        console.print("stopping")
    except (ServiceDiedError, OSError) as error:
        errors.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        services.stop()


@app.command()
def info(trainer: TrainerAddress = TRAINER, sampler: SamplerAddress = SAMPLER) -> None:
    """Describes the trainer and the sampler."""
    failed = False
    for name, client_type, address in (("trainer", TrainerClient, trainer), ("sampler", SamplerClient, sampler)):
        try:
            with client_type(address) as client:
                console.print(render.backend(name, client.get_backend_info()))
        except TinkerbellError as error:
            failed = True
            _print_error(error)
    raise typer.Exit(int(failed))


@app.command()
def adapters(trainer: TrainerAddress = TRAINER, sampler: SamplerAddress = SAMPLER) -> None:
    """Lists the adapters: what the trainer trains and what the sampler serves."""
    try:
        with TrainerClient(trainer) as trains, SamplerClient(sampler) as samples:
            trained, sampled = trains.list_lora_adapters(), samples.list_adapters()
    except TinkerbellError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    console.print(render.adapters(trained, sampled))


@app.command()
def checkpoints(
    adapter: Annotated[
        str, typer.Argument(help="The adapter, which need not exist any more.", show_default="all")
    ] = "",
    trainer: TrainerAddress = TRAINER,
) -> None:
    """Lists the trainer's checkpoints, oldest first."""
    try:
        with TrainerClient(trainer) as client:
            saved = client.list_checkpoints(adapter)
    except TinkerbellError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    console.print(render.checkpoints(saved))


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="The adapter.")],
    out_dir: Annotated[Path, typer.Argument(help="The folder to make.")],
    merge: Annotated[
        Path | None,
        typer.Option(
            metavar="BASE_FOLDER",
            exists=True,
            file_okay=False,
            help="The base model's folder: write the whole model, with the adapter in it, for transformers.",
            show_default="the adapter alone, for PEFT",
        ),
    ] = None,
    trainer: TrainerAddress = TRAINER,
) -> None:
    """Writes an adapter as it is now to a folder: as a PEFT adapter, or merged into the base model."""
    try:
        with TrainerClient(trainer) as client, tempfile.TemporaryDirectory() as temporary:
            if merge is None:
                client.export_peft_folder(adapter, out_dir)
            else:
                exported = Path(temporary, "adapter")
                client.export_peft_folder(adapter, exported)
                with render.merging(errors) as on_progress:
                    merging.merge(merge, exported, out_dir, on_progress)
    except (TinkerbellError, OSError, ValueError) as error:
        _print_error(error)
        raise typer.Exit(1) from None
    console.print(f"{out_dir}: {'the merged model' if merge else 'a PEFT adapter'}", highlight=False, soft_wrap=True)


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="What to ask, or the text to continue.")],
    adapter: Annotated[
        str, typer.Option(metavar="ID", help="The adapter to sample from.", show_default="the bare base model")
    ] = "",
    version: Annotated[int, typer.Option(min=0, help="The adapter's version; 0 means its latest.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Lay the prompt out by the chat template, or continue it as it is.")
    ] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.", show_default="random")] = None,
    sampler: SamplerAddress = SAMPLER,
) -> None:
    """Generates text and shows it as it comes."""
    delta = None
    try:
        with SamplerClient(sampler) as client:
            for delta in client.stream(
                [{"role": "user", "content": prompt}] if chat else prompt,
                adapter_id=adapter,
                version=version,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            ):
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    except TinkerbellError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        if delta:
            sys.stdout.write("\n")
    if delta:
        errors.print(render.served_by(delta.served_by), style="dim", highlight=False)


def _print_error(error: Exception) -> None:
    errors.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
