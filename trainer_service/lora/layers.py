"""Megatron linear layers that add, to each stretch of packed tokens, the LoRA delta of the adapter it belongs to.

Shapes: T packed tokens; activations are [T, 1, features] as Megatron has them. A pass is packed so that the tokens of
one adapter are one stretch; `Routing` says which.

Between ranks that share a layer only x A^T travels, [T, 1, ranks of one adapter]:

- Layers shared by output features: every rank has all of A and its rows of B. Each rank's B yields a part of the
  gradient of x A^T, and the parts must be summed. Without that sum the gradient of A is wrong, and nothing else looks
  wrong.
- Layers shared by input features: every rank has its columns of A and all of B. Each rank's A yields a part of x A^T.

With sequence parallelism the same sums also pass from all tokens to this rank's tokens, or back; the gradients of what
ranks hold copies of then come from this rank's tokens alone, and `Engine.optim_step` adds them up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from torch import nn

from trainer_service.lora.arena import FUSED_MODULES, Factor, LinearAdapter
from trainer_service.lora.routing import Routing, Segment
from trainer_service.megatron.layer_spec import LocalLayerNormColumnParallelLinear

# Rows of packed tokens, and the adapter that they belong to.
_Stretch = tuple[slice, LinearAdapter]


@dataclass(frozen=True)
class _Features:
    """Where one of the modules that Megatron has fused stands in the fused layer's output.

    The output is `groups` times the same sequence of modules; in each, this module's features are `start` to `stop`.
    """

    groups: int
    start: int
    stop: int

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """A view of `output` [T, features]: [T, groups, stop - start], and [T, stop - start] for a single group."""
        part = output.unflatten(-1, (self.groups, -1))[..., self.start : self.stop]
        return part.squeeze(1) if self.groups == 1 else part


# Autograd would keep a node and a gradient tensor for every matrix of every adapter. These two functions are all it
# sees of a layer, however many adapters share the pass: gradients accumulate in the arenas across calls, exactly and in
# float32, and arenas of adapters without tokens in the pass stay untouched.


class _LowRanks(torch.autograd.Function):
    """x A^T of every stretch, scaled: [T, 1, width]; zero to the right of an adapter's ranks, and between stretches."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, stretches: Sequence[_Stretch], width: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.stretches = stretches
        low_ranks = x.new_zeros(len(x), width)
        for rows, adapter in stretches:
            own = low_ranks[rows, : len(adapter.a.weight)]
            torch.mm(x[rows, 0], adapter.a.weight.to(x.dtype).T, out=own)
            own *= adapter.scale
        return low_ranks[:, None]

    @staticmethod
    def backward(ctx, grad_low_ranks: torch.Tensor):
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        for rows in _between(ctx.stretches, len(x)):
            grad_x[rows] = 0
        for rows, adapter in ctx.stretches:
            grad = (grad_low_ranks[rows, 0, : len(adapter.a.weight)] * adapter.scale).to(x.dtype)
            _accumulate(adapter.a, grad, x[rows, 0])
            torch.mm(grad, adapter.a.weight.to(x.dtype), out=grad_x[rows, 0])
        return grad_x, None, None


class _AddDeltas(torch.autograd.Function):
    """The base layer's output plus low_rank B^T of every stretch: [T, 1, features]."""

    @staticmethod
    def forward(ctx, output: torch.Tensor, low_ranks: torch.Tensor, stretches: Sequence[_Stretch], features):
        ctx.save_for_backward(low_ranks)
        ctx.stretches, ctx.features = stretches, features
        output = output.clone()
        for rows, ranks, part, b in _modules(stretches, features):
            target, weight = part.of(output[rows, 0]), b.weight.to(output.dtype)
            if target.dim() == 2:
                target.addmm_(low_ranks[rows, 0, ranks], weight.T)
            else:
                target.add_((low_ranks[rows, 0, ranks] @ weight.T).view(target.shape))
        return output

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        (low_ranks,) = ctx.saved_tensors
        grad_low_ranks = torch.zeros_like(low_ranks)
        for rows, ranks, part, b in _modules(ctx.stretches, ctx.features):
            grad = part.of(grad_output[rows, 0]).flatten(1)
            _accumulate(b, grad, low_ranks[rows, 0, ranks])
            torch.mm(grad, b.weight.to(grad.dtype), out=grad_low_ranks[rows, 0, ranks])
        return grad_output, grad_low_ranks, None, None


def _between(stretches: Sequence[_Stretch], num_tokens: int) -> Iterator[slice]:
    """The rows of no stretch."""
    start = 0
    for rows, _ in stretches:
        if rows.start > start:
            yield slice(start, rows.start)
        start = rows.stop
    if num_tokens > start:
        yield slice(start, num_tokens)


def _modules(
    stretches: Sequence[_Stretch], features: dict[str, _Features]
) -> Iterator[tuple[slice, slice, _Features, Factor]]:
    """Every module of every stretch: its rows, its ranks among the columns of x A^T, its features and its B."""
    for rows, adapter in stretches:
        start = 0
        for (module, b), rank in zip(adapter.b.items(), adapter.ranks, strict=True):
            yield rows, slice(start, start + rank), features[module], b
            start += rank


def _accumulate(factor: Factor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Adds to the gradient of W what y = x W^T has of it, with `grad` [T, out] of y and `x` [T, in]."""
    if grad.dtype == factor.gradient.dtype:
        factor.gradient.addmm_(grad.T, x)
    else:
        factor.gradient.add_(grad.T @ x)


class LoraLinear(nn.Module):
    """One of Megatron's linear layers with the deltas of all resident adapters."""

    def __init__(
        self,
        base: ColumnParallelLinear | RowParallelLinear,
        key: tuple[int, str],
        features: dict[str, _Features],
        routing: Routing,
    ):
        """`key`: the layer's number and Megatron's name; `features`: this rank's, of each fused module."""
        super().__init__()
        self.base = base
        self._config = base.config
        self._key = key
        self._features = features
        self._routing = routing
        self._by_input = key[1] in ("linear_proj", "linear_fc2")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the base layer's."""
        if isinstance(self.base, LocalLayerNormColumnParallelLinear):
            x = self.base.normalize(x)
            output, bias = self.base.project(x)
        else:
            output, bias = self.base(x)
        routing = self._routing
        width = max((len(adapter.a.weight) for _, adapter in self._stretches(routing.segments)), default=0)
        if not width:
            return output, bias
        before, after = self._stretches(routing.local_segments), self._stretches(routing.segments)
        if self._by_input:
            before, after = after, before
        low_ranks = self._across_ranks(_LowRanks.apply(x, before, width))
        return _AddDeltas.apply(output, low_ranks, after, self._features), bias

    def _stretches(self, segments: Sequence[Segment]) -> list[_Stretch]:
        """The segments whose adapters adapt this layer."""
        stretches = []
        start = 0
        for segment in segments:
            rows = slice(start, start + segment.num_tokens)
            adapter = segment.arena.linears.get(self._key) if segment.arena else None
            if adapter is not None:
                stretches.append((rows, adapter))
            start = rows.stop
        return stretches

    def _across_ranks(self, low_ranks: torch.Tensor) -> torch.Tensor:
        """The sums that the module's docstring speaks of, in one collective for all adapters."""
        config = self._config
        if config.tensor_model_parallel_size == 1:
            return low_ranks
        if self._by_input and config.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(low_ranks)
        if self._by_input:
            return mappings.reduce_from_tensor_model_parallel_region(low_ranks)
        if config.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(low_ranks)
        return mappings.copy_to_tensor_model_parallel_region(low_ranks)


def adapt(model: GPTModel, routing: Routing) -> None:
    """Replaces every linear layer of a GPTModel's decoder that adapters can target."""
    features = _features(model)
    for layer in model.decoder.layers:
        for owner in (layer.self_attention, layer.mlp):
            for linear in FUSED_MODULES:
                if hasattr(owner, linear):
                    key = (layer.layer_number - 1, linear)
                    setattr(owner, linear, LoraLinear(getattr(owner, linear), key, features[linear], routing))
    # All parameters are frozen, so without this autograd would see nothing to differentiate.
    if model.pre_process:
        model.embedding.register_forward_hook(
            lambda module, inputs, output: output.detach().requires_grad_(torch.is_grad_enabled())
        )


def _features(model: GPTModel) -> dict[str, dict[str, _Features]]:
    """For each of Megatron's linear layers, where its modules stand in this rank's part of the output."""
    config = model.config
    ranks = config.tensor_model_parallel_size
    groups = config.num_query_groups // ranks
    width = config.kv_channels
    queries = config.num_attention_heads // config.num_query_groups * width
    hidden, inner = config.hidden_size, config.ffn_hidden_size // ranks
    gate = inner if config.gated_linear_unit else 0
    return {
        # For each query group its query heads, its key head and its value head.
        "linear_qkv": {
            "q_proj": _Features(groups, 0, queries),
            "k_proj": _Features(groups, queries, queries + width),
            "v_proj": _Features(groups, queries + width, queries + 2 * width),
        },
        "linear_proj": {"o_proj": _Features(1, 0, hidden)},
        "linear_fc1": {"gate_proj": _Features(1, 0, gate), "up_proj": _Features(1, gate, gate + inner)},
        "linear_fc2": {"down_proj": _Features(1, 0, hidden)},
    }
