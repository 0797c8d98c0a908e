"""A payload's tensors in a slot: A as it is, B times its scale, rounded once, in one loop on a CPU or one kernel."""

import pytest
import torch
from kernels import DEVICE, compiled_only

from sampler_service.slot_copies import Copies, Copy
from sampler_service.slot_kernels import CopyKernel

# Rows and columns of a part, and its place (row, column) in a tensor of so many rows and columns.
PARTS = [
    ((8, 96), (0, 0), (8, 96)),
    ((40, 8), (16, 0), (64, 8)),
    ((3, 50), (0, 50), (3, 100)),
    ((70, 1), (0, 0), (70, 1)),
]


@pytest.mark.parametrize(
    ("way", "slot_dtype"),
    [
        (Copies, torch.float32),
        (Copies, torch.bfloat16),
        (CopyKernel, torch.float32),
        pytest.param(CopyKernel, torch.bfloat16, marks=compiled_only),  # the interpreter does not round
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_has_its_place_and_nothing_else_changes(way, slot_dtype, dtype) -> None:
    torch.manual_seed(0)
    payload = torch.randn(sum(rows * columns for _, _, (rows, columns) in PARTS), device=DEVICE).to(dtype)
    copies, expected, slots = [], [], []
    start = 0
    for index, (shape, (row, column), (rows, columns)) in enumerate(PARTS):
        scale = 1.0 if index % 2 == 0 else 3.7
        whole = payload[start : start + rows * columns].view(rows, columns)
        part = whole[row : row + shape[0], column : column + shape[1]]
        slot = torch.full((3, 1, 72, 128), -1.0, dtype=slot_dtype, device=DEVICE)
        copies.append(Copy(start + row * columns + column, columns, scale, slot[1, 0, : shape[0], : shape[1]]))
        wanted = slot.clone()
        # The product in float32, as exactly as that goes, and one rounding.
        wanted[1, 0, : shape[0], : shape[1]] = (part.float() * scale).to(slot_dtype)
        expected.append(wanted)
        slots.append(slot)
        start += rows * columns
    way(copies).fill(payload)
    for slot, wanted in zip(slots, expected, strict=True):
        assert torch.equal(slot, wanted)
