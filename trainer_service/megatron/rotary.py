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
        """Angles [T, 1, 1, D], with whatever the inner one returns beside them."""
        angles = self.inner(*args, **kwargs)
        if isinstance(angles, tuple):  # two bases, or angles and a factor
            return tuple(part[self._positions] if isinstance(part, torch.Tensor) else part for part in angles)
        return angles[self._positions]
