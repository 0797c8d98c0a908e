"""Ranks that share a model compute what one rank computes: log-probabilities, losses, gradients, trained weights.

Tolerance: 1e-5 relative in float32, of each array's norm.
"""

import functools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from processes import MODELS, TWO_RANKS, made_model, rank_environment
from rank_programs import layouts

from trainer_service.checkpoints import CheckpointStore
from trainer_service.parallel import Layout

pytestmark = [pytest.mark.engine, pytest.mark.cpu_only]

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder with what two ranks computed."""
    out = tmp_path_factory.mktemp("two-ranks")
    for _, architecture in layouts.LAYOUTS.values():
        made_model(f"tiny-{architecture}", "tiny", architecture)
    program = ["-m", "rank_programs.layouts", str(MODELS), str(out)]
    subprocess.run([*TWO_RANKS, *program], env=rank_environment(), check=True, timeout=500)
    return out


@functools.cache
def on_one_rank(architecture: str):
    """An engine with the model, in this process."""
    return layouts.loaded(made_model(f"tiny-{architecture}", "tiny", architecture), Layout())


@functools.cache
def trained_on_one_rank(architecture: str) -> dict[str, np.ndarray]:
    return layouts.train_tenants(*on_one_rank(architecture))


def relative_error(together: np.ndarray, alone: np.ndarray) -> float:
    return float(np.linalg.norm(together - alone) / max(np.linalg.norm(alone), 1e-12))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_two_ranks_compute_what_one_computes(two_ranks, layout) -> None:
    together = dict(np.load(two_ranks / f"{layout}.npz"))
    alone = trained_on_one_rank(layouts.LAYOUTS[layout][1])
    assert together.keys() == alone.keys()
    errors = {name: relative_error(together[name], alone[name]) for name in alone}
    assert max(errors.values()) <= TOLERANCE, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_a_checkpoint_of_two_ranks_resumes_on_one(two_ranks, tmp_path) -> None:
    engine, found = on_one_rank("qwen3")
    whole = np.array(layouts.train_steps(engine, found, CheckpointStore(tmp_path / "whole"), 1, 15))
    shutil.copytree(two_ranks / "checkpoints", tmp_path / "checkpoints")
    rest = np.array(layouts.train_steps(engine, found, CheckpointStore(tmp_path / "checkpoints"), 6, 15))
    first = np.load(two_ranks / "first.npz")["losses"]
    assert np.abs(first / whole[:5] - 1).max() <= TOLERANCE
    assert np.abs(rest / whole[5:] - 1).max() <= TOLERANCE
    assert whole[-1] < whole[0]
