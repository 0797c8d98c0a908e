"""Shows a report: a table in the terminal, one in Markdown, bars in a PNG.

python -m benchmarks.report benchmarks/results/NAME.json prints the Markdown.
"""

import sys
from pathlib import Path

import matplotlib
import rich.box
import rich.table

from benchmarks.harness import Report, Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLUMNS = ("row", "ours", "baseline", "unit", "ratio", "note")


def _cells(row: Row) -> tuple[str, ...]:
    return (row.name, f"{row.ours:.4g}", f"{row.baseline:.4g}", row.unit, f"{row.ratio:.2f}", row.note)


def table(report: Report) -> rich.table.Table:
    """For the terminal, without the notes, which are too long for it."""
    caption = "ratio: above 1 when ours is better"
    result = rich.table.Table(title=report.machine, caption=caption, box=rich.box.SIMPLE_HEAD)
    for column in _COLUMNS[:-1]:
        result.add_column(column, justify="right" if column in ("ours", "baseline", "ratio") else "left")
    for row in report.rows:
        result.add_row(*_cells(row)[:-1])
    return result


def markdown(report: Report) -> str:
    """For the README."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|--:|--:|---|--:|---|"]
    lines += [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in map(_cells, report.rows)]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join([f"{report.machine}; {report.date[:10]}; {versions}", "", *lines]) + "\n"


def draw(report: Report, file: Path) -> None:
    """The ratios as bars, from 1: to the right ours is better."""
    rows = report.rows[::-1]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    colors = ["tab:green" if row.ratio >= 1 else "tab:red" for row in rows]
    bars = axes.barh([row.name for row in rows], [row.ratio - 1 for row in rows], left=1, color=colors)
    axes.bar_label(bars, [f"{row.ratio:.2f}" for row in rows], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.15)
    title = f"{report.machine}, {report.date[:10]}".replace("; ", "\n")  # a GPU and its host
    axes.set(title=title, xlabel="ratio to the baseline, above 1 when ours is better")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    print(markdown(Report.read(Path(sys.argv[1]))), end="")
