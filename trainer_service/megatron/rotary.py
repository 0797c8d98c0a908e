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

    def __init__(self, inner: nn.Module, concentration: float):
        """`inner`: one of Megatron's rotary embeddings, whose angles depend on the position alone. `concentration`:
        what YaRN multiplies queries and keys by.
        """
        super().__init__()
        self.inner: Any = inner
        self._concentration = concentration
        self._turns: torch.Tensor | None = None
        self._beside: tuple = ()

    def turns(self, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """What `kernels.rotate` turns the heads of tokens at `positions` by, int64 [T] and below `longest`: float32
        [2, T, R], stacked in front where a model has two bases.
        """
        angles = self.inner(longest)
        if isinstance(angles, tuple):
            angles, *beside = angles
            self._beside = tuple(beside)
        angles = angles.index_select(-4, positions)[..., 0, 0, :].float()
        return torch.stack((angles.cos(), angles.sin()), dim=-3) * self._concentration

    @contextlib.contextmanager
    def use(self, turns: torch.Tensor) -> Iterator[None]:
        """For the passes inside the `with` block."""
        self._turns = turns
        try:
            yield
        finally:
            self._turns = None

    def get_rotary_seq_len(self, *args, **kwargs) -> int:
        """As the inner one's: the longest sequence."""
        return self.inner.get_rotary_seq_len(*args, **kwargs)

    def forward(self, *args, **kwargs):
        """The pass's turns, with whatever the inner embedding gives beside the angles."""
        return (self._turns, *self._beside) if self._beside else self._turns
