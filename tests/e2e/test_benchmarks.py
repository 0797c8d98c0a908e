"""The GPU benchmarks run, on tiny models and whatever device there is; their numbers mean nothing here."""

import subprocess
import sys

import pytest
from processes import ROOT

from benchmarks import harness
from benchmarks.gpu import PLANS, short
from benchmarks.harness import Report
from benchmarks.scale_plan import measurements

pytestmark = [pytest.mark.engine, pytest.mark.cpu_only]

# parity.smollm2 differs from parity.llama_8b in the model alone, and --quick gives both the same.
ROWS = [name for name, plan in PLANS.items() if not plan.needs_gpu and name != "parity.smollm2"]


@pytest.mark.timeout(1200)
def test_every_row_is_measured_and_written() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", f"--rows={','.join(ROWS)}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    file = ROOT / f"out/benchmarks/{short(harness.processor())}.json"
    report = Report.read(file)
    assert [row.name for row in report.rows] == ROWS
    assert file.with_suffix(".png").is_file()
    (parity,) = (row for row in report.rows if row.name == "parity.llama_8b")
    assert parity.ours < 1e-4  # float32


def test_scaling_of_training_is_measured_and_what_does_not_fit_is_named() -> None:
    """Two processors stand in for two GPUs. The other rows start ten engines at once, which takes them minutes."""
    rows = [each.name for each in measurements(2, quick=True)]
    command = [sys.executable, "-m", "benchmarks.scale", "--quick", f"--rows={','.join(rows)}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    report = Report.read(ROOT / f"out/benchmarks/scale-{short(harness.processor())}-x2.json")
    possible = ["train.8b_tp1_pp1_dp1", "train.8b_tp2_pp1_dp1", "train.8b_tp1_pp1_dp2", "train.64_tenants"]
    assert sorted(row.name for row in report.rows) == sorted(possible)
    skipped = [line.split()[1].rstrip(",") for line in run.stdout.splitlines() if line.startswith("skipped ")]
    assert sorted([*skipped, *possible]) == sorted(rows)


def test_a_gpu_gives_its_results_their_name() -> None:
    assert [short(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "AMD EPYC")] == [
        "h100",
        "h200",
        "amd-epyc",
    ]
