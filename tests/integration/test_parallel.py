"""Ranks that share a model compute what one rank computes: log-probabilities, losses, gradients, trained weights.

Tolerance: 1e-5 relative in float32, of each array's norm.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, made_model

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5
LAYOUTS = {  # tensor, pipeline, sequence parallel; two ranks
    "tensor": (2, 1, 0),
    "tensor-and-sequence": (2, 1, 1),
    "data": (1, 1, 0),
    "pipeline": (1, 2, 0),
}
# Between them: tied and untied output layers, biases, norms of q and k, a sliding window.
MODELS = {"tensor": "qwen3", "tensor-and-sequence": "qwen2", "data": "llama", "pipeline": "qwen2"}


def run(program: str, ranks: int, *arguments: object) -> None:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    path = str(ROOT / "tests/rank_programs" / program)
    subprocess.run([*launcher, path, *map(str, arguments)], cwd=ROOT, check=True, timeout=300)


def relative_error(together: np.ndarray, alone: np.ndarray) -> float:
    return float(np.linalg.norm(together - alone) / max(np.linalg.norm(alone), 1e-12))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank computes with a model; once for each."""
    results: dict[Path, dict[str, np.ndarray]] = {}

    def compute(model: Path) -> dict[str, np.ndarray]:
        if model not in results:
            out = tmp_path_factory.mktemp("alone") / "out.npz"
            run("train.py", 1, model, out, 1, 1, 0)
            results[model] = dict(np.load(out))
        return results[model]

    return compute


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_compute_what_one_computes(alone, tmp_path, layout) -> None:
    architecture = MODELS[layout]
    model = made_model(f"tiny-{architecture}", "tiny", architecture)
    run("train.py", 2, model, tmp_path / "out.npz", *LAYOUTS[layout])
    together = dict(np.load(tmp_path / "out.npz"))
    expected = alone(model)
    assert together.keys() == expected.keys()
    errors = {name: relative_error(together[name], expected[name]) for name in expected}
    assert max(errors.values()) <= TOLERANCE, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_a_checkpoint_of_two_ranks_resumes_on_one(tmp_path) -> None:
    model = made_model("tiny-llama", "tiny", "llama")
    run("resume.py", 1, model, tmp_path / "uninterrupted", 1, 1, 15, tmp_path / "whole.npz")
    run("resume.py", 2, model, tmp_path / "checkpoints", 2, 1, 5, tmp_path / "first.npz")
    run("resume.py", 1, model, tmp_path / "checkpoints", 1, 6, 15, tmp_path / "rest.npz")
    whole, first, rest = (np.load(tmp_path / f"{name}.npz")["losses"] for name in ("whole", "first", "rest"))
    assert relative_error(np.concatenate([first, rest]), whole) <= TOLERANCE
    assert np.abs(rest / whole[5:] - 1).max() <= TOLERANCE
    assert whole[-1] < whole[0]
