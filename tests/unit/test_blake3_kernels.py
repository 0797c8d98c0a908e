"""The GPU's BLAKE3 against that of the blake3 package."""

import kernels
import numpy as np
import pytest
import torch
from blake3 import blake3

from service_common.blake3_kernels import payload_hash

# The interpreter takes 0.1 s for each block of a chunk and for each level of the tree.
SIZES = [2, 62, 64, 66, 1026, 33 * 1024 + 130]
# Around the borders of blocks, chunks, lanes and subtrees, and two and three launches for the tree.
MORE_SIZES = [
    *(1, 63, 1022, 1024, 1025, 2048, 3 * 1024 + 2, 7 * 1024, 8 * 1024 + 510, 64 << 10, 131 * 1024),
    *(256 << 10, (256 << 10) + 2, (257 << 10) + 130, (64 << 20) + 1024, 168 << 20),
]


def random_bytes(size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("size", [*SIZES, *(pytest.param(size, marks=kernels.compiled_only) for size in MORE_SIZES)])
def test_it_is_blake3(size: int) -> None:
    content = random_bytes(size)
    assert payload_hash(content.to(kernels.DEVICE)) == blake3(content.numpy()).digest()


@pytest.mark.parametrize("start", [1, 2])
def test_payloads_need_no_alignment(start: int) -> None:
    content = random_bytes(24).view(torch.bfloat16)
    payload = content.to(kernels.DEVICE)[start:]
    assert payload_hash(payload) == blake3(content[start:].view(torch.uint8).numpy()).digest()


@pytest.mark.parametrize("payload", [torch.zeros(0), torch.zeros(2, 2), torch.zeros(4)[::2]])
def test_others_than_flat_payloads_are_refused(payload: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="flat, contiguous and not empty"):
        payload_hash(payload)
