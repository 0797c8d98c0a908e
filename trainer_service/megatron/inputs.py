"""What a pass reads, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainer_service.lora.arena import Arena
from trainer_service.lora.products import Segment
from trainer_service.megatron.layer_spec import Packed, batch_length
from trainer_service.megatron.rotary import PackedRotary


@dataclass(frozen=True)
class PackedSequence:
    """N tokens, N targets (both int64 [N]) and the adapter to apply, None for none."""

    arena: Arena | None
    tokens: np.ndarray
    targets: np.ndarray

    @classmethod
    def padding(cls, num_tokens: int) -> "PackedSequence":
        """Tokens that nobody asks for."""
        return cls(None, np.zeros(num_tokens, np.int64), np.zeros(num_tokens, np.int64))


@dataclass(frozen=True)
class Inputs:
    """T packed tokens: themselves and their targets, int64 [T], their rotary embedding, and where sequences end."""

    tokens: torch.Tensor
    targets: torch.Tensor
    turns: torch.Tensor  # of PackedRotary
    packed: Packed


def prepare(sequences: Sequence[PackedSequence], rotary: PackedRotary, device: torch.device) -> Inputs:
    """Sequences back to back."""

    def moved(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    lengths = [len(sequence.tokens) for sequence in sequences]
    bounds = moved([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    return Inputs(
        tokens=moved([sequence.tokens for sequence in sequences]),
        targets=moved([sequence.targets for sequence in sequences]),
        turns=rotary.turns(moved([np.arange(length) for length in lengths]), max(lengths)),
        packed=packed(bounds, lengths, batch_length(lengths)),
    )


def packed(bounds: torch.Tensor, lengths: Sequence[int], length: int) -> Packed:
    """Sequences of these lengths, between `bounds`, int32 [sequences + 1]; `length`: their batch_length."""
    return Packed(
        qkv_format="sbhd",  # to Megatron one long sequence; our attention and PackedRotary know better
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
        batch_length=length,
    )


def segments(sequences: Sequence[PackedSequence]) -> list[Segment]:
    """Sequences of one adapter that follow each other are one segment."""
    result: list[Segment] = []
    for sequence in sequences:
        if result and result[-1].arena is sequence.arena:
            result[-1] = Segment(sequence.arena, result[-1].num_tokens + len(sequence.tokens))
        else:
            result.append(Segment(sequence.arena, len(sequence.tokens)))
    return result
