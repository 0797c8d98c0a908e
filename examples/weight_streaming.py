"""New weights in the sampler: from memory to memory against a folder on disk.

    python -m examples.weight_streaming [--trainer HOST:PORT --sampler HOST:PORT]

Both ways are timed from the answer of an optimizer step to the first token that the new weights produce:

- in memory: SyncAdapter. The trainer pushes the adapter to the sampler, in the sampler's own element type.
- by disk: this program exports the adapter from the trainer into a PEFT folder (float32), reads the folder back and
  pushes what it read to the sampler with `push_adapter`.

The second is what a loop does that hands adapters over as files, less one thing: the sampler still takes them from
memory, where vLLM would read the folder itself. The file is read from the page cache, not from the device, and nothing
is flushed to it, so the disk is at its best. Rounds take turns, so that both see the same machine.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import rich
import rich.table
import typer
from rich.progress import track

from examples import support
from tinkerbell import Datum, SamplerClient, TrainerClient, TrainingRun, peft_folder

RANK = 16
LESSON = Datum.from_prompt_and_completion(range(100, 104), range(104, 132))  # what is learned does not matter here
PROMPT = [100, 101]


def first_token(sampler: SamplerClient, adapter_id: str, version: int) -> None:
    """Waits for the first token of a version."""
    delta = next(sampler.stream(PROMPT, adapter_id=adapter_id, version=version, max_tokens=1))
    assert delta.served_by.version == version


def in_memory(run: TrainingRun, sampler: SamplerClient) -> dict[str, float]:
    """Seconds of each part."""
    started = time.perf_counter()
    version = run.sync_adapter_to_vllm().result().version
    synced = time.perf_counter()
    first_token(sampler, run.adapter_id, version)
    return {"SyncAdapter": synced - started, "first token": time.perf_counter() - synced}


def by_disk(run: TrainingRun, sampler: SamplerClient, version: int, folder: Path) -> dict[str, float]:
    """Seconds of each part."""
    name = f"{run.adapter_id}-disk"
    started = time.perf_counter()
    run.export_peft_folder(folder)
    written = time.perf_counter()
    lora, weights = peft_folder.read(folder)
    read = time.perf_counter()
    sampler.push_adapter(name, version, weights, rank=lora.rank, alpha=lora.alpha)
    pushed = time.perf_counter()
    first_token(sampler, name, version)
    return {
        "export to a folder": written - started,
        "read the folder": read - written,
        "push_adapter": pushed - read,
        "first token": time.perf_counter() - pushed,
    }


def milliseconds(values: list[float]) -> str:
    """The median, for people."""
    return f"{1000 * statistics.median(values):.0f} ms"


def main(
    trainer_address: support.TrainerAddress = "",
    sampler_address: support.SamplerAddress = "",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each way.")] = 7,
    out: support.OutFolder = support.OUT / "weight_streaming",
) -> dict[str, list[float]]:
    """Measures the ways of new weights to the sampler. Returns the total seconds of each way's rounds."""
    memory: list[dict[str, float]] = []
    disk: list[dict[str, float]] = []
    with (
        support.services(trainer_address, sampler_address, out) as services,
        TrainerClient(services.trainer) as trainer,
        SamplerClient(services.sampler) as sampler,
        tempfile.TemporaryDirectory(dir=out) as folder,
    ):
        run = trainer.create_lora_adapter(support.new_name("streaming"), rank=RANK)
        parameters = run.adapter.num_parameters
        for version in track(range(1, rounds + 2), "rounds, with one to warm up"):
            run.forward_backward([LESSON])
            run.optim_step().result()
            memory.append(in_memory(run, sampler))
            run.forward_backward([LESSON])
            run.optim_step().result()
            disk.append(by_disk(run, sampler, version, Path(folder) / str(version)))
        run.remove()

    ways = {"in memory": memory[1:], "by disk": disk[1:]}
    totals = {way: [sum(parts.values()) for parts in measured] for way, measured in ways.items()}
    table = rich.table.Table(
        "way", "part", "median", title=f"{parameters / 1e6:.1f} M parameters, last optimizer step to first token"
    )
    for way, measured in ways.items():
        for part in measured[0]:
            table.add_row(way, part, milliseconds([parts[part] for parts in measured]))
        table.add_row(way, "total", milliseconds(totals[way]), end_section=True)
    rich.print(table)
    ratio = statistics.median(totals["by disk"]) / statistics.median(totals["in memory"])
    rich.print(f"In memory is {ratio:.1f} times as fast.")
    return totals


if __name__ == "__main__":
    typer.run(main)
