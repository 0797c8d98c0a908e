"""What ranks on GPUs compute in bfloat16, beside one GPU rank and one CPU rank in float32.

PYTHONPATH=.:tests python -m rank_programs.gpus    prints a table

One GPU is enough: both ranks share it then.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from processes import MODELS, made_model, rank_environment, two_gpu_ranks
from rank_programs import layouts

from trainer_service.parallel import Layout

type Results = dict[str, np.ndarray]

_PROGRAM = "rank_programs.gpus"  # this one
_SECONDS = 300  # for each of the three programs; imports and loading take most of it


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of what two GPU ranks computed in one layout, over all tenants, steps and tokens."""

    logprobs: float  # mean absolute difference to those of a CPU rank
    logprobs_of_one_rank: float  # the same of one GPU rank, which bfloat16 alone sets apart
    gradients: tuple[float, float]  # least and largest difference to those of one GPU rank, relative to their norm


def compared(folder: Path) -> dict[str, Comparison]:
    """By layout. Has all work done in processes of their own, which leave their results in `folder`."""
    for architecture in {architecture for _, architecture in layouts.LAYOUTS.values()}:
        made_model(f"tiny-{architecture}", "tiny", architecture)
    one_rank = [sys.executable, "-m", _PROGRAM]

    def computed(out: str, command: list[str], **environment: str) -> dict[str, Results]:
        (folder / out).mkdir()
        environment = rank_environment() | environment
        subprocess.run([*command, str(folder / out)], env=environment, check=True, timeout=_SECONDS)
        return {name: dict(np.load(folder / out / f"{name}.npz")) for name in layouts.LAYOUTS}

    # Megatron would compute some things on a GPU that it sees.
    on_cpu = computed("cpu", one_rank, CUDA_VISIBLE_DEVICES="")
    on_gpu = computed("gpu", one_rank)
    two_ranks = computed("two", two_gpu_ranks(_PROGRAM))
    return {
        name: Comparison(
            _difference_of_logprobs(two_ranks[name], on_cpu[name]),
            _difference_of_logprobs(on_gpu[name], on_cpu[name]),
            _differences_of_gradients(two_ranks[name], on_gpu[name]),
        )
        for name in layouts.LAYOUTS
    }


def _difference_of_logprobs(results: Results, reference: Results) -> float:
    names = [name for name in reference if " logprobs " in name]
    return float(np.mean(np.abs(np.concatenate([results[name] - reference[name] for name in names]))))


def _differences_of_gradients(results: Results, reference: Results) -> tuple[float, float]:
    names = [name for name in reference if name.endswith(" gradients")]
    errors = [np.linalg.norm(results[name] - reference[name]) / np.linalg.norm(reference[name]) for name in names]
    return float(min(errors)), float(max(errors))


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        comparisons = compared(Path(folder))
    whose = "which both ranks share" if torch.cuda.device_count() == 1 else "one for each rank"
    print(f"On {torch.cuda.get_device_name()}, {whose}; torch {torch.__version__}\n")
    print("| ranks | model | log-probabilities to CPU | of one GPU rank | gradients to one GPU rank |")
    print("|---|---|---|---|---|")
    for name, (_, architecture) in layouts.LAYOUTS.items():
        found = comparisons[name]
        least, largest = found.gradients
        print(
            f"| {name} | {architecture} | {found.logprobs:.4f} | {found.logprobs_of_one_rank:.4f} "
            f"| {least:.1%} to {largest:.1%} |"
        )


def work(out: Path) -> None:
    """What each rank does, or a process on its own."""
    if "RANK" not in os.environ:
        layouts.LAYOUTS.update({name: (Layout(), model) for name, (_, model) in layouts.LAYOUTS.items()})
    layouts.main(MODELS, out, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]))
    else:
        main()
