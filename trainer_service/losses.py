"""Losses over per-token log-probabilities."""

import enum
from collections.abc import Callable

import torch


class Loss(enum.Enum):
    """The losses by name."""

    CROSS_ENTROPY = "cross_entropy"


def cross_entropy(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """-sum_i weights[i] * logprobs[i], as Tinker defines it: a sum, so that gradients of requests add up.

    `logprobs` and `weights` float32 [T]; returns a scalar.
    """
    return -(logprobs * weights).sum()


LOSSES: dict[Loss, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {Loss.CROSS_ENTROPY: cross_entropy}
