"""Losses that the client differentiates itself."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from tinkerbell.inputs import Datum

if TYPE_CHECKING:
    import torch

CustomLoss = Callable[[Sequence[Datum], list[np.ndarray]], tuple[float, Sequence[ArrayLike]]]
"""Takes the data and each datum's logprobs, float32 [N]; returns the loss and, for each datum, its derivative with
respect to those logprobs, [N]. `torch_loss` makes one of a function that PyTorch differentiates."""


def torch_loss(fn: "Callable[[Sequence[Datum], list[torch.Tensor]], torch.Tensor]") -> CustomLoss:
    """A loss for `forward_backward_custom` from a function over PyTorch tensors.

    `fn` takes the data and each datum's logprobs, float32 [N], and returns a scalar tensor; a datum that it does not
    use gets no gradient. Needs PyTorch, which nothing else in the client does.
    """

    @functools.wraps(fn)
    def differentiated(data: Sequence[Datum], logprobs: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
        import torch  # noqa: PLC0415 - the client does without it

        leaves = [torch.tensor(scores, requires_grad=True) for scores in logprobs]
        loss = fn(data, leaves)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.item(), [gradient.numpy() for gradient in gradients]

    return differentiated


def evaluate(fn: CustomLoss, data: Sequence[Datum], logprobs: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """The loss and its derivatives, float32 [N] a datum. ValueError when `fn` returns other shapes."""
    loss, gradients = fn(data, [scores.copy() for scores in logprobs])
    arrays = [np.asarray(gradient, dtype=np.float32) for gradient in gradients]
    if len(arrays) != len(data):
        raise ValueError(f"the loss returned {len(arrays)} gradients for {len(data)} data")
    for number, (array, scores) in enumerate(zip(arrays, logprobs, strict=True)):
        if array.shape != scores.shape:
            raise ValueError(
                f"the loss returned a gradient of shape {array.shape} for datum {number} with {len(scores)} tokens"
            )
    return float(loss), arrays
