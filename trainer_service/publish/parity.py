"""Whether a sampler computes what the trainer computes: the same tokens, scored by both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinkerbell.v1 import common_pb2

# Mean absolute differences that rounding explains, by the element type of the sampler's weights. Random tokens are the
# least likely ones, and bfloat16 rounds those worst: on the default probe Hugging Face's SmolLM2 in bfloat16 is 0.07 to
# 0.23 from itself in float32, with and without an adapter, and here both sides round.
_TOLERANCES = {common_pb2.DATA_TYPE_FLOAT32: 0.01}
_TOLERANCE_16_BIT = 0.4


@dataclass(frozen=True)
class Probe:
    """Sequences and the trainer's log-probabilities of their tokens: one float32 [N - 1] per sequence of N tokens.

    tolerance: largest mean absolute difference that counts as agreement; None for what rounding explains.
    """

    sequences: Sequence[Sequence[int]]
    logprobs: Sequence[np.ndarray]
    tolerance: float | None = None

    def compare(self, logprobs: Sequence[np.ndarray], dtype: common_pb2.DataType) -> "Difference":
        """How far the log-probabilities of a sampler with weights of this type are from the trainer's."""
        distances = np.abs(np.concatenate(list(logprobs)).astype(np.float64) - np.concatenate(list(self.logprobs)))
        tolerance = _TOLERANCES.get(dtype, _TOLERANCE_16_BIT) if self.tolerance is None else self.tolerance
        return Difference(float(distances.mean()), float(distances.max()), distances.size, tolerance)


@dataclass(frozen=True)
class Difference:
    """Mean and maximum of absolute differences over a number of tokens, and what mean is tolerated."""

    mean: float
    max: float
    tokens: int
    tolerance: float

    @property
    def agrees(self) -> bool:
        """False also when the mean is not a number."""
        return self.mean <= self.tolerance


def default_sequences(adapter_id: str, vocab_size: int) -> list[list[int]]:
    """4 sequences of 16 tokens, always the same for an adapter."""
    rng = np.random.default_rng(list(adapter_id.encode()))
    return rng.integers(0, vocab_size, (4, 16)).tolist()
