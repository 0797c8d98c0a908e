"""The base model: passes of packed sequences through a Megatron GPTModel.

Shapes: T packed tokens, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.utils.checkpoint import checkpoint as recomputed

from service_common.checkpoint import Checkpoint
from trainer_service.lora import layers
from trainer_service.lora.routing import Routing, Segment
from trainer_service.megatron import loading

# Logits are made and differentiated this many tokens at a time: [T, V] would be the largest tensor of the pass by far.
_LOGIT_CHUNK_TOKENS = 1024


class BaseModel:
    """A frozen base model with adapted linear layers."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: Callable[[str], None]):
        """See loading.load."""
        self._device = device
        self._model = loading.load(checkpoint, device, dtype, report)
        self._routing = Routing()
        layers.adapt(self._model, self._routing)

    def token_logprobs(
        self, segments: Sequence[Segment], sequences: Sequence[np.ndarray], targets: Sequence[np.ndarray]
    ) -> torch.Tensor:
        """float32 [T]: log p(target | tokens up to here) for each token of the int64 `sequences`, back to back.

        `segments` say which adapter each stretch of whole sequences belongs to. Differentiating the result adds to the
        gradients of their arenas.
        """
        target_tokens = torch.from_numpy(np.concatenate(targets)).to(self._device)
        return self._forward(segments, sequences, _logprobs, target_tokens)

    def logits(self, segments: Sequence[Segment], sequences: Sequence[np.ndarray]) -> torch.Tensor:
        """[T, V] in the model's dtype. For comparing models; training never makes them all."""
        return self._forward(segments, sequences, _logits, None)

    def _forward(self, segments, sequences, output_processor, context):
        lengths = np.array([len(sequence) for sequence in sequences])
        bounds = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(self._device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=int(lengths.max()),
            max_seqlen_kv=int(lengths.max()),
        )
        tokens = torch.from_numpy(np.concatenate(sequences)).to(self._device)[None]
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(self._device)[None]
        with self._routing.use(segments):
            return self._model(
                tokens,
                positions,
                attention_mask=None,
                packed_seq_params=packed,
                output_processor=output_processor,
                output_processor_context=context,
            )


def _logits(hidden_states, output_layer, output_weight, **_):
    return output_layer(hidden_states, weight=output_weight)[0].squeeze(1)


def _logprobs(hidden_states, output_layer, output_weight, context, **_):
    def chunk_logprobs(hidden_chunk, target_chunk):
        chunk_logits, _ = output_layer(hidden_chunk, weight=output_weight)
        return -vocab_parallel_cross_entropy(chunk_logits.float(), target_chunk[:, None]).squeeze(1)

    hidden_chunks = hidden_states.split(_LOGIT_CHUNK_TOKENS)
    target_chunks = context.split(_LOGIT_CHUNK_TOKENS)
    if len(hidden_chunks) == 1:
        return chunk_logprobs(hidden_states, context)
    return torch.cat(
        [
            recomputed(chunk_logprobs, hidden, target, use_reentrant=False)
            for hidden, target in zip(hidden_chunks, target_chunks, strict=True)
        ]
    )
