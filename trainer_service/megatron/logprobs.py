"""Log-probabilities of targets from the last hidden states, without a matrix of all logits.

Shapes: T tokens, H hidden size, V vocabulary, over all ranks that share it.
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy

# Logits exist for this many tokens at a time: [T, V] would be the largest tensor of the pass by far.
_CHUNK_TOKENS = 1024

_Chunk = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Log-probabilities, float32 [T], from hidden states [T, 1, H] and targets [T]."""


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
            return logits[:, 0].log_softmax(-1, dtype=torch.float32).gather(1, targets[:, None])[:, 0]
        return -vocab_parallel_cross_entropy(logits.float(), targets[:, None]).squeeze(1)

    # With sequence parallelism the layer gathers the rows of all ranks, so that all have to come at once; the gradient
    # is of this rank's.
    is_gathered = output_layer.sequence_parallel
    num_tokens = len(context) if is_gathered else _CHUNK_TOKENS
    if not hidden_states.requires_grad or not torch.is_grad_enabled():
        parts = zip(hidden_states.split(num_tokens), context.split(num_tokens), strict=True)
        return torch.cat([chunk(rows, targets) for rows, targets in parts])
    first = output_layer.tp_group.rank() * len(hidden_states) if is_gathered else 0
    return _RowByRow.apply(hidden_states, context, chunk, num_tokens, first)
