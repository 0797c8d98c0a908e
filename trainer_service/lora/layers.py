"""Megatron linear layers that add, to each stretch of packed tokens, the LoRA delta of the adapter it belongs to.

Shapes: T packed tokens; activations are [T, 1, features] as Megatron has them. `products` has the arithmetic, `Routing`
says whose the tokens are.

Between ranks that share a layer only x A^T travels, [T, 1, ranks of one adapter]:

- Layers shared by output features: every rank has all of A and its rows of B. Each rank's B yields a part of the
  gradient of x A^T, and the parts must be summed. Without that sum the gradient of A is wrong, and nothing else looks
  wrong.
- Layers shared by input features: every rank has its columns of A and all of B. Each rank's A yields a part of x A^T.

With sequence parallelism the same sums also pass from all tokens to this rank's tokens, or back; the gradients of what
ranks hold copies of then come from this rank's tokens alone, and `Engine.optim_step` adds them up.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from megatron.core.transformer import TransformerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer_service.lora.arena import FUSED_MODULES
from trainer_service.lora.products import Features, Layer, Products
from trainer_service.lora.routing import Routing
from trainer_service.megatron.layer_spec import LocalLayerNormColumnParallelLinear


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer and its adapters, on a rank that has all of the layer: [T, 1, out].

    One function, so that the large matrix products add, in place, to what the adapters have: output and gradient of x
    are written twice and read once.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, products: Products | None):
        ctx.products = products
        if products is None:
            ctx.save_for_backward(weight)
            return F.linear(x, weight, bias)
        low = products.down(x)
        ctx.save_for_backward(weight, x, low)
        y = products.up(low)
        y[:, 0].addmm_(x[:, 0], weight.T)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor):
        weight, *adapted = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        if not adapted:
            return (grad_y[:, 0] @ weight)[:, None], None, None, None
        x, low = adapted
        grad_x = ctx.products.up_gradient(ctx.products.down_gradient(grad_y, low), x)
        grad_x[:, 0].addmm_(grad_y[:, 0], weight)
        return grad_x, None, None, None


class _Down(torch.autograd.Function):
    """x A^T: [T, 1, R]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, products: Products) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.products = products
        return products.down(x)

    @staticmethod
    def backward(ctx, grad_low: torch.Tensor):
        (x,) = ctx.saved_tensors
        return ctx.products.up_gradient(grad_low.contiguous(), x), None


class _Up(torch.autograd.Function):
    """scale * low B^T: [T, 1, out]."""

    @staticmethod
    def forward(ctx, low: torch.Tensor, products: Products) -> torch.Tensor:
        ctx.save_for_backward(low)
        ctx.products = products
        return products.up(low)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor):
        (low,) = ctx.saved_tensors
        return ctx.products.down_gradient(grad_y.contiguous(), low), None


class LoraLinear(nn.Module):
    """One of Megatron's linear layers with the deltas of a pass's adapters."""

    def __init__(self, base: ColumnParallelLinear | RowParallelLinear, layer: Layer, routing: Routing):
        super().__init__()
        self.base = base
        self._config = base.config
        self._layer = layer
        self._routing = routing
        self._by_input = layer.key[1] in ("linear_proj", "linear_fc2")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the base layer's."""
        base = self.base
        has_norm = isinstance(base, LocalLayerNormColumnParallelLinear)
        if has_norm:
            x = base.normalize(x)
        before, after = self._routing.local(self._layer), self._routing.whole(self._layer)
        if self._config.tensor_model_parallel_size == 1:
            added, left = (None, base.bias) if base.skip_bias_add else (base.bias, None)
            return _AdaptedLinear.apply(x.contiguous(), base.weight, added, after), left
        output, bias = base.project(x) if has_norm else base(x)
        if before is None or after is None:
            return output, bias
        if self._by_input:
            before, after = after, before
        low = self._across_ranks(_Down.apply(x.contiguous(), before))
        return output + _Up.apply(low, after), bias

    def _across_ranks(self, low: torch.Tensor) -> torch.Tensor:
        """The sums that the module's docstring speaks of, in one collective for all adapters."""
        if self._by_input and self._config.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(low)
        if self._by_input:
            return mappings.reduce_from_tensor_model_parallel_region(low)
        if self._config.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(low)
        return mappings.copy_to_tensor_model_parallel_region(low)


def adaptable(model: GPTModel) -> list[Layer]:
    """Every linear layer of a GPTModel's decoder that adapters can target."""
    features = _features(model)
    return [
        Layer((layer.layer_number - 1, linear), getattr(owner, linear).weight.size(1), features[linear])
        for layer in model.decoder.layers
        for owner, linear in _linears(layer)
    ]


def adapt(model: GPTModel, layers: Sequence[Layer], routing: Routing) -> None:
    """Puts a LoraLinear in the place of each of the model's `adaptable` layers."""
    described = iter(layers)
    for layer in model.decoder.layers:
        for owner, linear in _linears(layer):
            setattr(owner, linear, LoraLinear(getattr(owner, linear), next(described), routing))
    # All parameters are frozen, so without this autograd would see nothing to differentiate.
    if model.pre_process:
        model.embedding.register_forward_hook(
            lambda module, inputs, output: output.detach().requires_grad_(torch.is_grad_enabled())
        )


def recompute(model: GPTModel, routing: Routing) -> None:
    """Makes decoder layers keep nothing but their inputs for the backward pass, and run again there."""
    for layer in model.decoder.layers:
        layer.forward = _recomputed(layer.forward, routing)


def _recomputed(forward: Callable, routing: Routing) -> Callable:
    def run(*args, **kwargs):
        # The backward pass comes when the routing is another's, or nobody's.
        whole, local = routing.whole, routing.local

        def routed(*args, **kwargs):
            with routing.using(whole, local):
                return forward(*args, **kwargs)

        return checkpoint(routed, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _linears(layer: TransformerLayer) -> list[tuple[nn.Module, str]]:
    """A decoder layer's modules that own one of them, and its name there."""
    owners = (layer.self_attention, layer.mlp)
    return [(owner, linear) for owner in owners for linear in FUSED_MODULES if hasattr(owner, linear)]


def _features(model: GPTModel) -> dict[str, dict[str, Features]]:
    """For each of Megatron's linear layers, where its modules stand in this rank's part of the output."""
    config = model.config
    ranks = config.tensor_model_parallel_size
    groups = config.num_query_groups // ranks
    head = config.kv_channels
    queries = config.num_attention_heads // config.num_query_groups * head
    group = queries + 2 * head
    hidden, inner = config.hidden_size, config.ffn_hidden_size // ranks
    gate = inner if config.gated_linear_unit else 0
    return {
        # For each query group its query heads, its key head and its value head.
        "linear_qkv": {
            "q_proj": Features(groups, 0, queries, group),
            "k_proj": Features(groups, queries, queries + head, group),
            "v_proj": Features(groups, queries + head, group, group),
        },
        "linear_proj": {"o_proj": Features(1, 0, hidden, hidden)},
        "linear_fc1": {
            "gate_proj": Features(1, 0, gate, gate + inner),
            "up_proj": Features(1, gate, gate + inner, gate + inner),
        },
        "linear_fc2": {"down_proj": Features(1, 0, hidden, hidden)},
    }
