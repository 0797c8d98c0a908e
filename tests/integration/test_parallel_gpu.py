"""Ranks on GPUs compute what one GPU computes, in bfloat16; on one GPU both ranks share it.

Tolerance: log-probabilities within 0.02 in the mean of a CPU rank's in float32, gradients within 5% of the norm of one
GPU rank's. One GPU rank is about 0.009 from the CPU's.
"""

import pytest
import torch
from rank_programs import gpus, layouts

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory) -> dict[str, gpus.Comparison]:
    return gpus.compared(tmp_path_factory.mktemp("ranks"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_two_gpu_ranks_compute_what_one_computes(comparisons, layout) -> None:
    found = comparisons[layout]
    assert found.logprobs <= 0.02
    assert found.logprobs_of_one_rank <= 0.02
    assert found.gradients[1] <= 0.05
