"""Measures on one GPU at the size of Llama-3.1-8B; shows the table, and writes JSON and plot after every row.

make bench-gpu                                                       every row
.venv/bin/python -m benchmarks.gpu --rows push.200,scale.tenants     some rows
.venv/bin/python -m benchmarks.gpu --quick                           do they run? (tiny models, also without a GPU)

A row that fails is reported and left out. A complete run at full size goes to benchmarks/results, everything else to
out/benchmarks.
"""

import argparse
import re
import sys
import time

import rich
import torch

from benchmarks import harness, isolated, report
from benchmarks.harness import Report, Row
from benchmarks.isolated import Plan

_START_SECONDS = 600.0  # engines load 16 GB, and vLLM compiles for its own logits, and for the sampler's in float32
_SAMPLES, _TRAINING = "benchmarks.gpu_sample", "benchmarks.gpu_train"
PLANS = {
    "train.vs_peft": Plan(_TRAINING, "train", 60),
    "train.cobatch8_vs_peft_swap": Plan(_TRAINING, "train", 120),
    "train.small_step": Plan(_TRAINING, "train", 60),
    "train.lora_overhead": Plan(_TRAINING, "train", 60),
    "train.cobatch8_vs_serial": Plan(_TRAINING, "train", 60),
    "scale.tenants": Plan(_TRAINING, "train", 120),
    "sample.vs_vllm_1": Plan(_SAMPLES, "sample", 60),
    "sample.vs_vllm_4": Plan(_SAMPLES, "sample", 60),
    "parity.llama_8b": Plan(_SAMPLES, "sample", 60),
    "push.cuda_ipc_vs_disk": Plan(_SAMPLES, "sample", 60, needs_gpu=True),
    "push.grpc_vs_disk": Plan(_SAMPLES, "sample", 60),
    "loop.memory_vs_disk": Plan(_SAMPLES, "sample", 60),
    "push.200": Plan(_SAMPLES, "sample", 90),
    "parity.smollm2": Plan(_SAMPLES, "smollm2", 60),
}


def accelerator() -> str:
    """The GPU's name, the processor's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else harness.processor()


def short(name: str) -> str:
    """A GPU's name as a file name: the part with its number, h100 for NVIDIA H100 80GB HBM3."""
    number = re.search(r"\b[A-Z]+\d+\w*", name)
    return harness.slug(number[0] if number else name)


def main() -> None:
    """Parses the command line and runs the rows. Exits with 1 when one is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"of {', '.join(PLANS)}, with commas between; all unless given")
    parser.add_argument("--quick", action="store_true", help="a smoke test, whose numbers mean nothing")
    arguments = parser.parse_args()
    possible = [name for name, plan in PLANS.items() if torch.cuda.is_available() or not plan.needs_gpu]
    chosen = arguments.rows.split(",") if arguments.rows else possible
    if unknown := sorted(set(chosen) - set(PLANS)):
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(PLANS)}")
    is_complete = not (arguments.rows or arguments.quick)
    folder = harness.ROOT / ("benchmarks/results" if is_complete else "out/benchmarks")
    file = folder / f"{short(accelerator())}.json"
    machine = f"{accelerator()}; {harness.machine()}"
    rows: list[Row] = []
    missing = []
    started = time.monotonic()
    plans = {name: plan for name, plan in PLANS.items() if name in chosen}
    for result in isolated.measured(plans, arguments.quick, _START_SECONDS):
        elapsed = f"{time.monotonic() - started:.0f} s"
        if isinstance(result, str):
            missing.append(result)
            print(f"[{elapsed}] missing: {result}", flush=True)
            continue
        rows.append(result)
        print(f"[{elapsed}] {result.name}: {result.ratio:.2f} ({result.note})", flush=True)
        current = Report(machine, harness.versions(), harness.now(), rows)
        current.write(file)
        report.draw(current, file.with_suffix(".png"))
    if rows:
        rich.print(report.table(current))
        print(f"{file} and {file.with_suffix('.png').name}")
    sys.exit("\n".join(["missing:", *missing]) if missing else 0)


if __name__ == "__main__":
    main()
