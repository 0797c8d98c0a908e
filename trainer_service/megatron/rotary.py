"""Rotary position embeddings for packed sequences."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class PackedRotary(nn.Module):
    """Gives each packed token the angles of its place in its own sequence.

    Megatron's own way with packed sequences is to turn one sequence after the other, layer by layer.
    """

    def __init__(self, inner: nn.Module):
        """`inner`: one of Megatron's rotary embeddings, whose angles depend on the position alone."""
        super().__init__()
        self.inner: Any = inner
        self._positions: torch.Tensor | None = None

    @contextlib.contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """For the passes inside the `with` block; `positions`: int64 [T]."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def get_rotary_seq_len(self, *args, **kwargs) -> int:
        """As the inner one's: the longest sequence."""
        return self.inner.get_rotary_seq_len(*args, **kwargs)

    def forward(self, *args, **kwargs):
        """Angles [T, 1, 1, D], stacked in front where a model has two bases, with whatever comes beside them."""
        angles = self.inner(*args, **kwargs)
        if isinstance(angles, tuple):
            return angles[0].index_select(-4, self._positions), *angles[1:]
        return angles.index_select(-4, self._positions)
