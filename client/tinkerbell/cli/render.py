"""What the `tinkerbell` command shows."""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from tinkerbell import results
from tinkerbell.local import ServiceSpec, State

_STATES: dict[State, str] = {"starting": "starting", "loading": "loading the base model", "ready": "ready"}


class Startup:
    """A line for each service, kept current while they start."""

    def __init__(self, console: Console, specs: Sequence[ServiceSpec]):
        self._states: dict[str, State] = {spec.name: "starting" for spec in specs}
        self._spinners = {spec.name: Spinner("dots", spec.name) for spec in specs}
        self._live = Live(self._lines(), console=console, transient=False)

    def __enter__(self) -> "Startup":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, spec: ServiceSpec, state: State) -> None:
        """Shows the service's new state."""
        self._states[spec.name] = state
        self._live.update(self._lines(), refresh=True)

    def _lines(self) -> Group:
        lines: list[Text | Spinner] = []
        for name, state in self._states.items():
            if state == "ready":
                lines.append(Text(f"✓ {name}: ready", style="green"))
            else:
                spinner = self._spinners[name]
                spinner.update(text=f"{name}: {_STATES[state]}")
                lines.append(spinner)
        return Group(*lines)


def addresses(trainer: str, sampler: str) -> Panel:
    """Where the services listen, and how to begin."""
    example = Syntax(
        f'run = tinkerbell.TrainerClient("{trainer}").create_lora_adapter("me")\n'
        f'tinkerbell.SamplerClient("{sampler}").generate("Hello").result().text',
        "python",
        word_wrap=True,
        background_color="default",
    )
    where = Text(f"trainer  {trainer}\nsampler  {sampler}\n")
    return Panel(Group(where, example), title="Tinkerbell", subtitle="Ctrl-C stops it", expand=False)


def backend(name: str, info: results.TrainerInfo | results.SamplerInfo) -> Table:
    """A service's description, a field a row."""
    table = Table(title=name, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    fields = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    base_model = fields.pop("base_model")
    if base_model is None:
        table.add_row("base_model", "not loaded")
    else:
        for field in dataclasses.fields(base_model):
            label = "base_model" if field.name == "name" else field.name
            table.add_row(label, Text(_shown(getattr(base_model, field.name))))
    for label, value in fields.items():
        table.add_row(label, Text(_shown(value)))
    return table


def adapters(trained: Sequence[results.LoraAdapter], sampled: Sequence[results.SampledAdapter]) -> Table:
    """Trained adapters in order of creation, then those that only the sampler has."""
    table = Table()
    for column in ("adapter", "rank", "alpha", "step", "published", "live versions", "running"):
        table.add_column(column, justify="left" if column in {"adapter", "live versions"} else "right")
    live = {adapter.adapter_id: adapter for adapter in sampled}
    for adapter in trained:
        shape = (str(adapter.lora.rank), f"{adapter.lora.alpha:g}")
        published = str(adapter.published_version or "")
        table.add_row(
            adapter.adapter_id, *shape, str(adapter.step), published, *_live(live.pop(adapter.adapter_id, None))
        )
    for only_sampled in live.values():
        newest = only_sampled.versions[-1]
        shape = (str(newest.lora.rank), f"{newest.lora.alpha:g}")
        table.add_row(only_sampled.adapter_id, *shape, "", "", *_live(only_sampled))
    return table


def checkpoints(saved: Sequence[results.Checkpoint]) -> Table:
    """A checkpoint a row, with times of this machine's zone."""
    table = Table()
    for column in ("checkpoint", "rank", "step", "size", "saved", "expires"):
        table.add_column(column, justify="right" if column in {"rank", "step", "size"} else "left")
    for checkpoint in saved:
        expires = _time(checkpoint.expires_at) if checkpoint.expires_at else "never"
        size = decimal(checkpoint.size_bytes)
        rank, step = str(checkpoint.lora.rank), str(checkpoint.step)
        table.add_row(checkpoint.checkpoint_id, rank, step, size, _time(checkpoint.created_at), expires)
    return table


@contextlib.contextmanager
def merging(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar that the given function moves: bytes written, bytes in all."""
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("merging", total=None)
        yield lambda written, total: progress.update(task, completed=written, total=total)


def served_by(version: results.AdapterVersion) -> str:
    """For example "alice version 3, 0123456789ab"."""
    if not version.adapter_id:
        return f"base model {version.digest[:12]}"
    return f"{version.adapter_id} version {version.version}, {version.digest[:12]}"


def _live(adapter: results.SampledAdapter | None) -> tuple[str, str]:
    if adapter is None:
        return "", ""
    versions = ", ".join(str(live.version) for live in adapter.versions)
    return versions, str(sum(live.active_requests for live in adapter.versions))


def _time(moment: datetime.datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key} {item}" for key, item in sorted(value.items()))
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
