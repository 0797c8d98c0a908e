"""The copies that fill a slot on a GPU: all of them in one kernel launch, where they would be some hundreds."""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sampler_service.slot_copies import Copy

# What a table has of each copy: offset in the payload, address of the target, rows, columns, the two's strides from row
# to row, the scale (the bits of a float32).
_FIELDS = 7
_BLOCK = 2048


@triton.jit
def _fill(payload, table, SLOT: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    entry = table + tl.program_id(1) * FIELDS
    # Within a factor 32 bits are enough, and dividing 64 would take most of the time.
    rows, columns = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = element // columns
    column = element - row * columns
    exists = row < rows
    source = payload + tl.load(entry) + row * tl.load(entry + 4).to(tl.int32) + column
    target = tl.load(entry + 1).to(tl.pointer_type(SLOT)) + row * tl.load(entry + 5).to(tl.int32) + column
    scale = tl.load(entry + 6).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(target, (tl.load(source, mask=exists).to(tl.float32) * scale).to(SLOT), mask=exists)


class CopyKernel:
    """All copies of payloads of one layout into one slot; as slot_copies.Copies."""

    def __init__(self, copies: Sequence[Copy]):
        entries = [
            (
                copy.offset,
                copy.target.data_ptr(),
                *copy.target.shape,
                copy.stride,
                copy.target.stride(0),
                struct.unpack("<i", struct.pack("<f", copy.scale))[0],
            )
            for copy in copies
        ]
        slot = copies[0].target
        self._table = torch.tensor(entries, dtype=torch.int64, device=slot.device)
        self._grid = (triton.cdiv(max(copy.target.numel() for copy in copies), _BLOCK), len(entries))
        self._dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[slot.dtype]

    def fill(self, payload: torch.Tensor) -> None:
        """Copies, scaling in float32 and rounding once. `payload`: flat, of any floating dtype, where the slot is."""
        _fill[self._grid](payload, self._table, self._dtype, _FIELDS, _BLOCK)
