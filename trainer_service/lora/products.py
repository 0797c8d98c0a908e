"""What adapters compute in one linear layer, y = x W^T + scale * (x A^T) B^T, and its gradients.

Shapes: T packed tokens, R columns of x A^T; activations are [T, 1, features] as Megatron has them.

Autograd would keep a node and a gradient tensor for every matrix of every adapter. Here gradients are added to the
arenas, across calls, exactly and in float32, and arenas of adapters without tokens in the pass stay untouched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trainer_service.lora.arena import Arena, Factor, LinearAdapter

Key = tuple[int, str]
"""A linear layer: the number of its decoder layer, and Megatron's name."""


@dataclass(frozen=True)
class Segment:
    """A stretch of packed tokens of one adapter; `arena` None for the bare base model."""

    arena: Arena | None
    num_tokens: int


@dataclass(frozen=True)
class Features:
    """Where one of the modules that Megatron has fused stands in the fused layer's output.

    The output is `groups` times the same sequence of modules, `width` features long; in each, this module's are `start`
    to `stop`.
    """

    groups: int
    start: int
    stop: int
    width: int

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """A view of `output` [T, features]: [T, groups, stop - start], and [T, stop - start] for a single group."""
        part = output.unflatten(-1, (self.groups, -1))[..., self.start : self.stop]
        return part.squeeze(1) if self.groups == 1 else part


@dataclass(frozen=True)
class Layer:
    """A linear layer that adapters can target; sizes are this rank's."""

    key: Key
    num_inputs: int
    modules: Mapping[str, Features]


def num_outputs(modules: Mapping[str, Features]) -> int:
    """Features of a fused layer's output."""
    any_of_them = next(iter(modules.values()))
    return any_of_them.groups * any_of_them.width


class Products(Protocol):
    """Of all adapters of a pass with one linear layer."""

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """x A^T, [T, 1, R]; undefined to the right of an adapter's ranks, and in rows without an adapter."""
        ...

    def up(self, low: torch.Tensor) -> torch.Tensor:
        """scale * low B^T, [T, 1, out]; zero where there is no adapter."""
        ...

    def down_gradient(self, grad_y: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """The gradient of `low`, and adds that of B to the arenas."""
        ...

    def up_gradient(self, grad_low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of x through the adapters, zero where there is none, and adds that of A to the arenas."""
        ...


Batch = Callable[[Layer], Products | None]
"""A pass's products with each layer; None where no adapter of the pass adapts it."""


def no_adapters(layer: Layer) -> None:
    """A `Batch` of the bare base model."""


def looped(segments: Sequence[Segment]) -> Batch:
    """One adapter after the other with PyTorch's matrix products; `segments` cover all tokens in order."""

    def products(layer: Layer) -> Products | None:
        stretches = []
        start = 0
        for segment in segments:
            rows = slice(start, start + segment.num_tokens)
            adapter = segment.arena.linears.get(layer.key) if segment.arena else None
            if adapter is not None:
                stretches.append((rows, adapter))
            start = rows.stop
        return _Looped(stretches, layer.modules) if stretches else None

    return products


class _Looped:
    def __init__(self, stretches: list[tuple[slice, LinearAdapter]], features: Mapping[str, Features]):
        self._stretches = stretches
        self._features = features
        self._width = max(len(adapter.a.weight) for _, adapter in stretches)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        # Zeros, as ranks add up what each of them has, also of the columns that nobody reads.
        low = x.new_zeros(len(x), 1, self._width)
        for rows, adapter in self._stretches:
            weight = adapter.a.weight.to(x.dtype)
            torch.mm(x[rows, 0], weight.T, out=low[rows, 0, : len(weight)])
        return low

    def up(self, low: torch.Tensor) -> torch.Tensor:
        y = low.new_zeros(len(low), 1, num_outputs(self._features))
        for rows, ranks, features, b, scale in self._modules():
            target, weight = features.of(y[rows, 0]), b.weight.to(y.dtype)
            if target.dim() == 2:
                target.addmm_(low[rows, 0, ranks], weight.T, alpha=scale)
            else:
                target.add_((low[rows, 0, ranks] @ weight.T).view(target.shape), alpha=scale)
        return y

    def down_gradient(self, grad_y: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        grad_low = torch.zeros_like(low)
        for rows, ranks, features, b, scale in self._modules():
            grad = features.of(grad_y[rows, 0]).flatten(1)
            _accumulate(b, grad, low[rows, 0, ranks], scale)
            torch.mm(grad, b.weight.to(grad.dtype), out=grad_low[rows, 0, ranks]).mul_(scale)
        return grad_low

    def up_gradient(self, grad_low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        grad_x = torch.zeros_like(x)
        for rows, adapter in self._stretches:
            grad = grad_low[rows, 0, : len(adapter.a.weight)]
            _accumulate(adapter.a, grad, x[rows, 0])
            torch.mm(grad, adapter.a.weight.to(grad.dtype), out=grad_x[rows, 0])
        return grad_x

    def _modules(self) -> Iterator[tuple[slice, slice, Features, Factor, float]]:
        """Every module of every stretch: its rows, its ranks among the columns of x A^T, its features, B and scale."""
        for rows, adapter in self._stretches:
            start = 0
            for (module, b), rank, scale in zip(adapter.b.items(), adapter.ranks, adapter.scales, strict=True):
                yield rows, slice(start, start + rank), self._features[module], b, scale
                start += rank


def _accumulate(factor: Factor, grad: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
    """Adds to the gradient of W what y = scale * x W^T has of it, with `grad` [T, out] of y and `x` [T, in]."""
    if grad.dtype == factor.gradient.dtype:
        factor.gradient.addmm_(grad.T, x, alpha=scale)
    else:
        factor.gradient.add_(grad.T @ x, alpha=scale)
