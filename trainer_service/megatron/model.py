"""The base model: passes of packed sequences through a Megatron GPTModel, over all ranks that hold it together.

Shapes: T packed tokens, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import distributed
from torch.utils.checkpoint import checkpoint as recomputed

from service_common.checkpoint import Checkpoint
from trainer_service.lora import layers
from trainer_service.lora.arena import Arena, Shard
from trainer_service.lora.routing import Routing, Segment
from trainer_service.megatron import loading
from trainer_service.megatron.rotary import PackedRotary
from trainer_service.parallel import Place

# Logits are made and differentiated this many tokens at a time: [T, V] would be the largest tensor of the pass by far.
_LOGIT_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class PackedSequence:
    """N tokens, N targets (both int64 [N]) and the adapter to apply, None for none."""

    arena: Arena | None
    tokens: np.ndarray
    targets: np.ndarray


Objective = Callable[[torch.Tensor, Sequence[int]], torch.Tensor | None]
"""What to differentiate: called with logprobs, float32 [T], of the sequences whose indices follow, back to back."""


class BaseModel:
    """A frozen base model with adapted linear layers; this rank's part of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        place: Place,
        report: Callable[[str], None],
    ):
        """See loading.load."""
        self._device = device
        self._dtype = dtype
        self._place = place
        loading.check_divisible(checkpoint, place)
        self._model = loading.load(checkpoint, device, dtype, place, report)
        tensor = place.tensor
        self._routing = Routing(tensor.index, tensor.size) if place.sequence_parallel else Routing()
        layers.adapt(self._model, self._routing)
        self._rotary = PackedRotary(self._model.rotary_pos_emb)
        self._model.rotary_pos_emb = self._rotary
        numbers = [layer.layer_number - 1 for layer in self._model.decoder.layers]
        self.shard = Shard(range(numbers[0], numbers[-1] + 1), tensor.index, tensor.size)

    def run(self, sequences: Sequence[PackedSequence], objective: Objective) -> None:
        """One pass. Sequences of one adapter that follow each other become one stretch.

        `objective` is called on the ranks of the last stage, once for each of the pieces that a pipeline works on. If
        it returns a scalar, that is differentiated, which adds to the gradients of the sequences' arenas.
        """
        pieces = _split_evenly([len(sequence.tokens) for sequence in sequences], self._place.pipeline.size)
        running = []
        for piece in pieces:
            chosen = [sequences[index] for index in piece]
            received = self._receive_hidden(chosen)
            output = self._forward(chosen, received, _logprobs)
            if self._place.pipeline.is_last:
                output = objective(output[: sum(len(sequence.tokens) for sequence in chosen)], piece)
            else:
                self._send(output.detach(), self._place.pipeline.next)
            running.append((received, output))
        if not torch.is_grad_enabled():
            return
        for received, output in running:
            if self._place.pipeline.is_last:
                if output is not None and output.requires_grad:
                    output.backward()
                gradient = None if received is None else received.grad
            else:
                torch.autograd.backward(output, self._receive(output, self._place.pipeline.next))
                gradient = None if received is None else received.grad
            if received is not None:
                self._send(torch.zeros_like(received) if gradient is None else gradient, self._place.pipeline.previous)

    def logits(self, sequences: Sequence[PackedSequence]) -> torch.Tensor:
        """[T, V] in the model's dtype, for comparing models; training never makes them all. One stage only."""
        return self._forward(sequences, None, _logits)[: sum(len(sequence.tokens) for sequence in sequences)]

    def _forward(self, sequences, received, output_processor):
        sequences = [*sequences, *self._padding(sequences)]
        lengths = np.array([len(sequence.tokens) for sequence in sequences])
        bounds = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)).to(self._device)
        packed = PackedSeqParams(
            qkv_format="sbhd",  # to Megatron one long sequence; PackedSDPA and PackedRotary know better
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=int(lengths.max()),
            max_seqlen_kv=int(lengths.max()),
        )
        tokens = torch.from_numpy(np.concatenate([sequence.tokens for sequence in sequences])).to(self._device)
        targets = torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences])).to(self._device)
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(self._device)
        if received is not None:
            self._model.set_input_tensor(received)
        with self._routing.use(_segments(sequences)), self._rotary.at(positions):
            return self._model(
                tokens[None],
                positions[None],
                attention_mask=None,
                packed_seq_params=packed,
                output_processor=output_processor,
                output_processor_context=targets,
            )

    def _padding(self, sequences) -> list[PackedSequence]:
        """Ranks that share the tokens need equally many."""
        missing = -sum(len(sequence.tokens) for sequence in sequences) % self._routing.parts
        return [PackedSequence(None, np.zeros(missing, np.int64), np.zeros(missing, np.int64))] if missing else []

    def _receive_hidden(self, sequences) -> torch.Tensor | None:
        if self._place.pipeline.is_first:
            return None
        num_tokens = sum(len(sequence.tokens) for sequence in [*sequences, *self._padding(sequences)])
        hidden = torch.empty(
            num_tokens // self._routing.parts, 1, self._model.config.hidden_size, dtype=self._dtype, device=self._device
        )
        return self._receive(hidden, self._place.pipeline.previous).requires_grad_(torch.is_grad_enabled())

    def _receive(self, like: torch.Tensor, rank: int) -> torch.Tensor:
        buffer = torch.empty_like(like, requires_grad=False)
        distributed.recv(buffer, rank, group=self._place.pipeline.group)
        return buffer

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        distributed.send(tensor.contiguous(), rank, group=self._place.pipeline.group)


def _segments(sequences: Sequence[PackedSequence]) -> list[Segment]:
    segments: list[Segment] = []
    for sequence in sequences:
        if segments and segments[-1].arena is sequence.arena:
            segments[-1] = Segment(sequence.arena, segments[-1].num_tokens + len(sequence.tokens))
        else:
            segments.append(Segment(sequence.arena, len(sequence.tokens)))
    return segments


def _split_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Cuts 0..len(lengths) in order into at most `parts` pieces of about equally many tokens."""
    pieces: list[list[int]] = [[]]
    share = sum(lengths) / parts
    done = 0
    for index, length in enumerate(lengths):
        if pieces[-1] and done + length / 2 > share * len(pieces):
            pieces.append([])
        pieces[-1].append(index)
        done += length
    return pieces


def _logits(hidden_states, output_layer, output_weight, **_):
    logits = output_layer(hidden_states, weight=output_weight)[0]
    return gather_from_tensor_model_parallel_region(logits).squeeze(1)


def _logprobs(hidden_states, output_layer, output_weight, context, **_):
    def chunk_logprobs(hidden_chunk, target_chunk):
        chunk_logits, _ = output_layer(hidden_chunk, weight=output_weight)
        return -vocab_parallel_cross_entropy(chunk_logits.float(), target_chunk[:, None]).squeeze(1)

    if output_layer.sequence_parallel or len(context) <= _LOGIT_CHUNK_TOKENS:
        return chunk_logprobs(hidden_states, context)
    return torch.cat(
        [
            recomputed(chunk_logprobs, hidden, target, use_reentrant=False)
            for hidden, target in zip(
                hidden_states.split(_LOGIT_CHUNK_TOKENS), context.split(_LOGIT_CHUNK_TOKENS), strict=True
            )
        ]
    )
