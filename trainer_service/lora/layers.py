"""Megatron linear layers that add, to each stretch of packed tokens, the LoRA delta of the adapter it belongs to.

Shapes: T packed tokens; activations are [T, 1, features] as Megatron has them. A pass is packed so that the tokens of
one adapter are one stretch; `Routing` says which.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import nn

from trainer_service.lora.arena import FUSED_MODULES, LinearAdapter
from trainer_service.lora.routing import Routing
from trainer_service.megatron.layer_spec import LocalLayerNormColumnParallelLinear


class _ArenaLinear(torch.autograd.Function):
    """y = x W^T, whose backward adds dL/dW to the arena.

    Autograd would collect a gradient per tensor and per call; this accumulates across calls, exactly and in float32,
    and leaves the arenas of adapters that have no tokens in the pass untouched.
    """

    @staticmethod
    def forward(ctx, x, weight, gradient):
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        ctx.gradient += grad_output.flatten(0, 1).T @ x.flatten(0, 1)
        return grad_output @ weight.to(grad_output.dtype), None, None


class LoraLinear(nn.Module):
    """One of Megatron's linear layers with the deltas of all resident adapters."""

    def __init__(
        self,
        base: nn.Module,
        key: tuple[int, str],
        widths: dict[str, int],
        assemble: Callable[[list[torch.Tensor]], torch.Tensor],
        routing: Routing,
    ):
        """`key`: the layer's number and Megatron's name; `widths`: output features of each fused module;
        `assemble`: puts the modules' outputs, in this order, into the order of the base layer's output.
        """
        super().__init__()
        self.base = base
        self._key = key
        self._widths = widths
        self._assemble = assemble
        self._routing = routing

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the base layer's."""
        if isinstance(self.base, LocalLayerNormColumnParallelLinear):
            x = self.base.normalize(x)
            output, bias = self.base.project(x)
        else:
            output, bias = self.base(x)
        segments = self._routing.segments
        adapters = [segment.arena.linears.get(self._key) if segment.arena else None for segment in segments]
        if not any(adapters):
            return output, bias
        stretches = x.split([segment.num_tokens for segment in segments])
        deltas = [
            self._delta(stretch, adapter) if adapter else stretch.new_zeros(*stretch.shape[:-1], output.size(-1))
            for stretch, adapter in zip(stretches, adapters, strict=True)
        ]
        return output + (deltas[0] if len(deltas) == 1 else torch.cat(deltas)), bias

    def _delta(self, x: torch.Tensor, adapter: LinearAdapter) -> torch.Tensor:
        low_rank = _ArenaLinear.apply(x, adapter.a.weight, adapter.a.gradient) * adapter.scale
        low_ranks = dict(zip(adapter.b, low_rank.split(adapter.rank, dim=-1), strict=True))
        outputs = []
        for module, width in self._widths.items():
            if module in adapter.b:
                b = adapter.b[module]
                outputs.append(_ArenaLinear.apply(low_ranks[module], b.weight, b.gradient))
            else:
                outputs.append(x.new_zeros(*x.shape[:-1], width))
        return self._assemble(outputs)


def adapt(model: GPTModel, routing: Routing) -> None:
    """Replaces every linear layer of a GPTModel's decoder that adapters can target."""
    config = model.config
    query_width = config.num_attention_heads * config.kv_channels
    key_width = config.num_query_groups * config.kv_channels
    widths = {
        "q_proj": query_width,
        "k_proj": key_width,
        "v_proj": key_width,
        "o_proj": config.hidden_size,
        "gate_proj": config.ffn_hidden_size,
        "up_proj": config.ffn_hidden_size,
        "down_proj": config.hidden_size,
    }

    def interleave_groups(outputs: list[torch.Tensor]) -> torch.Tensor:
        # Megatron's fused output holds, for each query group, its query heads, its key head and its value head.
        grouped = [output.unflatten(-1, (config.num_query_groups, -1)) for output in outputs]
        return torch.cat(grouped, dim=-1).flatten(-2)

    for layer in model.decoder.layers:
        for owner in (layer.self_attention, layer.mlp):
            for linear in FUSED_MODULES:
                if hasattr(owner, linear):
                    adapted = LoraLinear(
                        getattr(owner, linear),
                        (layer.layer_number - 1, linear),
                        {module: widths[module] for module in FUSED_MODULES[linear]},
                        interleave_groups if linear == "linear_qkv" else lambda outputs: torch.cat(outputs, dim=-1),
                        routing,
                    )
                    setattr(owner, linear, adapted)
    # All parameters are frozen, so without this autograd would see nothing to differentiate.
    model.embedding.register_forward_hook(
        lambda module, inputs, output: output.detach().requires_grad_(torch.is_grad_enabled())
    )
