"""The copies that fill a slot, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Copy:
    """A factor in a payload, or one rank's part of it, and its place in a slot.

    offset: of its first element in the payload. stride: from row to row there, in elements. scale: what it is
    multiplied by. target: [rows, columns] of the slot, contiguous in its rows.
    """

    offset: int
    stride: int
    scale: float
    target: torch.Tensor


class Copies:
    """All copies of payloads of one layout into one slot."""

    def __init__(self, copies: Sequence[Copy]):
        self._copies = copies

    def fill(self, payload: torch.Tensor) -> None:
        """Copies, scaling in float32 and rounding once. `payload`: flat, of any floating dtype, where the slot is."""
        for copy in self._copies:
            source = payload.as_strided(copy.target.shape, (copy.stride, 1), copy.offset)
            if copy.scale == 1:
                copy.target.copy_(source)
            else:
                wide = source if source.dtype == copy.target.dtype else source.float()
                torch.mul(wide, copy.scale, out=copy.target)
