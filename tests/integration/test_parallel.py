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


def train(model: Path, out: Path, ranks: int, layout: tuple[int, int, int]) -> dict[str, np.ndarray]:
    program = [str(ROOT / "tests/rank_programs/train.py"), str(model), str(out), *map(str, layout)]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run([*launcher, *program], cwd=ROOT, check=True, timeout=300)
    return dict(np.load(out))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request) -> Path:
    return made_model(f"tiny-{request.param}", "tiny", request.param)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> dict[str, np.ndarray]:
    return train(model, tmp_path_factory.mktemp("alone") / "out.npz", 1, (1, 1, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_compute_what_one_computes(model, alone, tmp_path, layout) -> None:
    together = train(model, tmp_path / "out.npz", 2, LAYOUTS[layout])
    assert together.keys() == alone.keys()
    errors = {
        name: np.linalg.norm(together[name] - alone[name]) / max(np.linalg.norm(alone[name]), 1e-12) for name in alone
    }
    assert max(errors.values()) <= TOLERANCE, sorted(errors.items(), key=lambda item: -item[1])[:5]
