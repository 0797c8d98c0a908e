"""The GPU's BLAKE3 against that of the blake3 package."""

import kernels
import numpy as np
import pytest
import torch
from blake3 import blake3

from service_common.blake3_kernels import payload_hash

# Around the borders of blocks, chunks, lanes and subtrees. The interpreter takes seconds for each.
SIZES = [1, 2, 63, 64, 66, 1022, 1024, 1025, 2048, 7 * 1024, 8 * 1024 + 510, 33 * 1024 + 130, 131 * 1024, 168 << 20]


@pytest.mark.parametrize("size", [5 * 1024 + 66, *(pytest.param(size, marks=kernels.compiled_only) for size in SIZES)])
def test_it_is_blake3(size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert payload_hash(torch.from_numpy(content).to(kernels.DEVICE)) == blake3(content.tobytes()).digest()
