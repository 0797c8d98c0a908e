"""Measures, shows the table, and writes JSON and plot.

make bench                                           every row
.venv/bin/python -m benchmarks.run train.vs_peft     some rows
.venv/bin/python -m benchmarks.run --quick           do they run? (a tiny model, two repetitions)

A complete run at full size goes to benchmarks/results, everything else to out/benchmarks.
"""

import argparse
import os

import rich

from benchmarks import harness, report

# As the trainer's command line has it; it must be set before PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
from benchmarks import sample, train

ROWS = train.ROWS | sample.ROWS


def main() -> None:
    """Parses the command line and runs the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all unless given")
    parser.add_argument("--quick", action="store_true", help="a smoke test, whose numbers mean nothing")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.rows) - set(ROWS))
    if unknown:
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    rows = []
    for name, measure in ROWS.items():
        if not arguments.rows or name in arguments.rows:
            rows.append(measure(arguments.quick))
            print(f"{name}: {rows[-1].ratio:.2f} ({rows[-1].note})", flush=True)
    measured = harness.Report(harness.machine(), harness.versions(), harness.now(), rows)
    is_complete = not (arguments.rows or arguments.quick)
    folder = harness.ROOT / ("benchmarks/results" if is_complete else "out/benchmarks")
    file = folder / f"{harness.slug(harness.processor())}.json"
    measured.write(file)
    report.draw(measured, file.with_suffix(".png"))
    rich.print(report.table(measured))
    print(f"{file} and {file.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
