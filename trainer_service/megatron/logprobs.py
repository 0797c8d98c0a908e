"""Log-probabilities of targets from the last hidden states, without a matrix of all logits.

Shapes: T tokens, H hidden size, V vocabulary, over all ranks that share it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)

# Logits exist for this many tokens at a time: [T, V] would be the largest tensor of the pass by far.
_CHUNK_TOKENS = 1024

_Chunk = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Log-probabilities, float32 [T], from hidden states [T, 1, H] and targets [T]."""


class _Float32Product(torch.autograd.Function):
    """x [T, H] times a frozen weight's transpose, both of any dtype, in float32; x's gradient is of its own dtype."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor):
        ctx.save_for_backward(weight)
        if x.is_cuda and x.dtype != torch.float32:  # a GPU adds up in float32, and need not round what comes out
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (weight,) = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, None


def _float32_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    sequence_parallel: bool,
    allreduce_dgrad: bool,
    tp_group: torch.distributed.ProcessGroup,
    **_,
) -> torch.Tensor:
    """As Megatron's linear_with_frozen_weight, without a bias, which no output layer has."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    if allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    # Flattened out here: Megatron's cross entropy of several ranks writes into the logits, and autograd has no in-place
    # writes into a view that a Function returns.
    return _Float32Product.apply(input.flatten(0, -2), weight).unflatten(0, input.shape[:-1])


def keep_logits_in_float32(output_layer: ColumnParallelLinear) -> None:
    """Makes the logits float32, as the sampler's are: what each of the two rounds for itself sets them apart.

    MiniMax-M1 (https://arxiv.org/abs/2506.13585) found most of that difference here, and ScaleRL
    (https://arxiv.org/abs/2510.13786) that reinforcement learning gets further without it.
    """
    output_layer._forward_impl = _float32_linear


class _RowByRow(torch.autograd.Function):
    """Applies a `_Chunk` to all tokens, and differentiates it where its logits still exist.

    A token's log-probability depends on its own row of the hidden states alone. So the rows of the sum's gradient are
    all that the backward pass needs: it scales each by what the loss says.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, chunk: _Chunk, num_tokens: int, first: int):
        logprobs, gradients = [], []
        for part, row_targets in zip(hidden.split(num_tokens), targets.split(num_tokens), strict=True):
            with torch.enable_grad():
                rows = part.detach().requires_grad_()
                computed = chunk(rows, row_targets)
                (gradient,) = torch.autograd.grad(computed.sum(), rows)
            logprobs.append(computed.detach())
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        ctx.first = first
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad_logprobs: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        own = grad_logprobs[ctx.first : ctx.first + len(gradient), None, None]
        return (own * gradient).to(gradient.dtype), None, None, None, None


def process(hidden_states: torch.Tensor, output_layer: ColumnParallelLinear, output_weight, context, **_):
    """As GPTModel.forward takes an output processor; `context`: targets, int64 [T]. Returns float32 [T]."""

    def chunk(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits, _ = output_layer(rows, weight=output_weight)
        if output_layer.tp_group.size() == 1:
            return logits[:, 0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return -vocab_parallel_cross_entropy(logits, targets[:, None]).squeeze(1)

    # With sequence parallelism the layer gathers the rows of all ranks, so that all have to come at once; the gradient
    # is of this rank's.
    is_gathered = output_layer.sequence_parallel
    num_tokens = len(context) if is_gathered else _CHUNK_TOKENS
    if not hidden_states.requires_grad or not torch.is_grad_enabled():
        parts = zip(hidden_states.split(num_tokens), context.split(num_tokens), strict=True)
        return torch.cat([chunk(rows, targets) for rows, targets in parts])
    first = output_layer.tp_group.rank() * len(hidden_states) if is_gathered else 0
    return _RowByRow.apply(hidden_states, context, chunk, num_tokens, first)
