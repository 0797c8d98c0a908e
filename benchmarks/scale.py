"""Measures how trainer, sampler and pushes scale on the GPUs of one host; shows the table, writes JSON and plot.

.venv/bin/python -m benchmarks.scale                               all that these GPUs can do
.venv/bin/python -m benchmarks.scale --rows train.8b_tp2_pp1_dp1   some rows
.venv/bin/python -m benchmarks.scale --quick                       do they run? (tiny models, also without a GPU)

Rows that need more GPUs than there are, or that fail, are named in the end. benchmarks/README.md says what is compared.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import rich
import torch

from benchmarks import gpu, harness, report
from benchmarks.harness import Report, Row
from benchmarks.scale_plan import BASELINE, Measured, Measurement, measurements, waves
from benchmarks.scale_services import LOGS, Services, service_rows

_WANTED = {(1, 1, 2): 0.9, (1, 1, 8): 0.9, (2, 1, 1): 0.75}  # of the efficiency; nothing is asked of the others
# Of one program for torchrun: half a minute of imports, and a quarter of a minute for each layout.
_START_SECONDS, _LAYOUT_SECONDS = 90, 60


def trained(wanted: Sequence[Measurement], num_gpus: int) -> Iterator[Measured | str]:
    """Each result; in words what went wrong where there is none."""
    for wave in waves(wanted, num_gpus):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            programs, first = [], 0
            for number, world in enumerate(wave):
                programs.append(_start(world, first, folder / f"{number}.jsonl"))
                stack.callback(_end, programs[-1])
                first += world[0].num_gpus
            deadline = time.monotonic() + _START_SECONDS + _LAYOUT_SECONDS * max(map(len, wave))
            for number, (world, program) in enumerate(zip(wave, programs, strict=True)):
                how = f"it took too long; see {LOGS}"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = program.wait(max(0.0, deadline - time.monotonic()))
                    how = f"its ranks ended with status {status}; see {LOGS}"
                file = folder / f"{number}.jsonl"
                lines = file.read_text().splitlines() if file.is_file() else []
                results = [Measured(**json.loads(line)) for line in lines]
                yield from results
                yield from (f"{measurement.name}: {how}" for measurement in world[len(results) :])


def _start(world: Sequence[Measurement], first_gpu: int, results: Path) -> subprocess.Popen:
    size = world[0].num_gpus
    wanted = json.dumps([dataclasses.asdict(measurement) for measurement in world])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command = [sys.executable, "-W", "ignore", *torchrun, "-m", "benchmarks.scale_ranks", str(results), wanted, device]
    visible = ",".join(map(str, range(first_gpu, first_gpu + size)))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"ranks-{size}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, cwd=harness.ROOT, stdout=log, stderr=subprocess.STDOUT)


def _end(program: subprocess.Popen) -> None:
    """torchrun ends its ranks."""
    program.terminate()
    program.wait()


def train_rows(wanted: Sequence[Measurement], results: dict[str, Measured]) -> Iterator[Row]:
    """Tokens per second against as many times what one GPU does with the 8B model, or as much arithmetic."""
    one = results.get(BASELINE)
    for measurement in wanted:
        result = results.get(measurement.name)
        if result is None or one is None:
            continue
        baseline = measurement.num_gpus * one.tokens_per_second * one.num_parameters / result.num_parameters
        against = "" if result.num_parameters == one.num_parameters else ", as many parameters a second as the 8B model"
        note = f"{measurement.layout}; against {measurement.num_gpus} times one GPU{against}"
        if measurement.tenants > 1:
            note += f", which trains one adapter; here {measurement.tenants} of rank {measurement.rank} share each pass"
        place = measurement.tensor, measurement.pipeline, measurement.data
        if measurement.tenants == 1 and place in _WANTED:
            note += f"; at least {_WANTED[place]} wanted"
        if result.memory_gb:
            note += f"; {result.memory_gb:.0f} GB at most on the first GPU"
        yield Row(measurement.name, result.tokens_per_second, baseline, "tokens/s", note)


class _Results:
    """Rows as they come, shown, written and drawn; and what is missing."""

    def __init__(self, num_gpus: int, is_complete: bool):
        folder = harness.ROOT / ("benchmarks/results" if is_complete else "out/benchmarks")
        self._file = folder / f"scale-{gpu.short(gpu.accelerator())}-x{num_gpus}.json"
        self._machine = f"{num_gpus} x {gpu.accelerator()}; {harness.machine()}"
        self._started = time.monotonic()
        self._rows: list[Row] = []
        self.missing: list[str] = []

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:.0f} s] {text}", flush=True)

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._rows.append(row)
            self.say(f"{row.name}: {row.ratio:.2f} ({row.note})")
        if self._rows:
            current = Report(self._machine, harness.versions(), harness.now(), self._rows)
            current.write(self._file)
            report.draw(current, self._file.with_suffix(".png"))

    def miss(self, what: str) -> None:
        self.missing.append(what)
        self.say(f"missing: {what}")

    def show(self) -> None:
        if self._rows:
            rich.print(report.table(Report.read(self._file)))
            print(f"{self._file} and {self._file.with_suffix('.png').name}")


def _measure(plan: Sequence[Measurement], services: Services, chosen: Sequence[str], num_gpus: int, out: _Results):
    """All of the chosen rows, for which there must be GPUs enough."""
    wanted = [each for each in plan if each.name in chosen]
    if wanted and all(each.name != BASELINE for each in wanted):
        wanted.insert(0, plan[0])
    results: dict[str, Measured] = {}
    for result in trained(wanted, num_gpus):
        if isinstance(result, str):
            out.miss(result)
        else:
            results[result.name] = result
            out.say(f"{result.name}: {result.tokens_per_second:,.0f} tokens/s")
    out.add(row for row in train_rows(wanted, results) if row.name in chosen)
    of_services = [name for name in services.names if name in chosen]
    if of_services:
        try:
            out.add(row for row in service_rows(services) if row.name in of_services)
        except Exception as failure:
            out.miss(f"{', '.join(of_services)}: {failure}")


def main() -> None:
    """Parses the command line and runs the rows. Exits with 1 when one that these GPUs can do is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="names with commas between; all unless given")
    parser.add_argument("--quick", action="store_true", help="a smoke test, whose numbers mean nothing")
    arguments = parser.parse_args()
    num_gpus = torch.cuda.device_count() or 2  # processors stand in for GPUs
    plan = measurements(num_gpus, arguments.quick)
    services = Services(num_gpus, arguments.quick)
    names = [measurement.name for measurement in plan] + services.names
    chosen = arguments.rows.split(",") if arguments.rows else names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(names)}")
    too_large = {each.name: each.num_gpus for each in plan if each.num_gpus > num_gpus} | services.too_large
    possible = [name for name in chosen if name not in too_large]
    out = _Results(num_gpus, is_complete=not (arguments.rows or arguments.quick))
    _measure(plan, services, possible, num_gpus, out)
    out.show()
    for name in chosen:
        if name in too_large:
            print(f"skipped {name}, which needs {too_large[name]} GPUs")
    sys.exit("\n".join(["missing:", *out.missing]) if out.missing else 0)


if __name__ == "__main__":
    main()
