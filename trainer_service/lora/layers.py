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

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from torch import nn

from trainer_service.lora.arena import FUSED_MODULES, LinearAdapter
from trainer_service.lora.routing import Routing, Segment
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
        base: ColumnParallelLinear | RowParallelLinear,
        key: tuple[int, str],
        widths: dict[str, int],
        assemble: Callable[[list[torch.Tensor]], torch.Tensor],
        routing: Routing,
    ):
        """`key`: the layer's number and Megatron's name; `widths`: this rank's output features of each fused module;
        `assemble`: puts the modules' outputs, in this order, into the order of the base layer's output.
        """
        super().__init__()
        self.base = base
        self._config = base.config
        self._key = key
        self._widths = widths
        self._assemble = assemble
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
        if not any(self._adapters(routing.segments)):
            return output, bias
        before, after = routing.local_segments, routing.segments
        if self._by_input:
            before, after = after, before
        low_ranks = self._across_ranks(self._low_ranks(x, before), after)
        deltas = [
            self._delta(low_rank, adapter) if adapter else output.new_zeros(*low_rank.shape[:-1], output.size(-1))
            for low_rank, adapter in zip(low_ranks, self._adapters(after), strict=True)
        ]
        return output + (deltas[0] if len(deltas) == 1 else torch.cat(deltas)), bias

    def _adapters(self, segments: Sequence[Segment]) -> list[LinearAdapter | None]:
        return [segment.arena.linears.get(self._key) if segment.arena else None for segment in segments]

    def _low_ranks(self, x: torch.Tensor, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """x A^T of each segment, scaled: [tokens, 1, ranks of its adapter]."""
        stretches = x.split([segment.num_tokens for segment in segments])
        return [
            (_ArenaLinear.apply(stretch, adapter.a.weight, adapter.a.gradient) * adapter.scale).to(stretch.dtype)
            if adapter
            else stretch.new_zeros(*stretch.shape[:-1], 0)
            for stretch, adapter in zip(stretches, self._adapters(segments), strict=True)
        ]

    def _across_ranks(self, low_ranks: list[torch.Tensor], after: Sequence[Segment]) -> list[torch.Tensor]:
        """The sums that the module's docstring speaks of, in one collective for all segments."""
        config = self._config
        if config.tensor_model_parallel_size == 1:
            return low_ranks
        widths = [sum(adapter.ranks) if adapter else 0 for adapter in self._adapters(after)]
        widest = max(sum(adapter.ranks) for adapter in self._adapters(self._routing.segments) if adapter)
        packed = torch.cat([F.pad(low_rank, (0, widest - low_rank.size(-1))) for low_rank in low_ranks])
        if self._by_input and config.sequence_parallel:
            packed = mappings.reduce_scatter_to_sequence_parallel_region(packed)
        elif self._by_input:
            packed = mappings.reduce_from_tensor_model_parallel_region(packed)
        elif config.sequence_parallel:
            packed = mappings.gather_from_sequence_parallel_region(packed)
        else:
            packed = mappings.copy_to_tensor_model_parallel_region(packed)
        stretches = packed.split([segment.num_tokens for segment in after])
        return [stretch[..., :width] for stretch, width in zip(stretches, widths, strict=True)]

    def _delta(self, low_rank: torch.Tensor, adapter: LinearAdapter) -> torch.Tensor:
        low_ranks = dict(zip(adapter.b, low_rank.split(adapter.ranks, dim=-1), strict=True))
        outputs = []
        for module, width in self._widths.items():
            if module in adapter.b:
                b = adapter.b[module]
                outputs.append(_ArenaLinear.apply(low_ranks[module], b.weight, b.gradient))
            else:
                outputs.append(low_rank.new_zeros(*low_rank.shape[:-1], width))
        return self._assemble(outputs)


def adapt(model: GPTModel, routing: Routing) -> None:
    """Replaces every linear layer of a GPTModel's decoder that adapters can target."""
    config = model.config
    ranks = config.tensor_model_parallel_size
    query_groups = config.num_query_groups // ranks
    query_width = config.num_attention_heads * config.kv_channels // ranks
    key_width = query_groups * config.kv_channels
    widths = {
        "q_proj": query_width,
        "k_proj": key_width,
        "v_proj": key_width,
        "o_proj": config.hidden_size,
        "gate_proj": config.ffn_hidden_size // ranks,
        "up_proj": config.ffn_hidden_size // ranks,
        "down_proj": config.hidden_size,
    }
    if not config.gated_linear_unit:
        del widths["gate_proj"]

    def interleave_groups(outputs: list[torch.Tensor]) -> torch.Tensor:
        # Megatron's fused output holds, for each query group, its query heads, its key head and its value head.
        grouped = [output.unflatten(-1, (query_groups, -1)) for output in outputs]
        return torch.cat(grouped, dim=-1).flatten(-2)

    for layer in model.decoder.layers:
        for owner in (layer.self_attention, layer.mlp):
            for linear in FUSED_MODULES:
                if hasattr(owner, linear):
                    adapted = LoraLinear(
                        getattr(owner, linear),
                        (layer.layer_number - 1, linear),
                        {module: widths[module] for module in FUSED_MODULES[linear] if module in widths},
                        interleave_groups if linear == "linear_qkv" else lambda outputs: torch.cat(outputs, dim=-1),
                        routing,
                    )
                    setattr(owner, linear, adapted)
    # All parameters are frozen, so without this autograd would see nothing to differentiate.
    if model.pre_process:
        model.embedding.register_forward_hook(
            lambda module, inputs, output: output.detach().requires_grad_(torch.is_grad_enabled())
        )
