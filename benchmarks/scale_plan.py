"""What the scale benchmark measures of the trainer, and what of it at the same time.

Imports nothing heavy: the program that starts the others has no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

RANK = 32
REPEATS = 5
BASELINE = "train.8b_tp1_pp1_dp1"
_LAYOUTS = {
    "8b": [(1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2), (4, 1, 1), (2, 2, 1), (4, 2, 1), (4, 1, 2), (1, 1, 8)],
    "70b": [(4, 1, 1), (4, 2, 1), (8, 1, 1)],
}
_TOKENS_PER_GPU = {"8b": 4096, "70b": 1024}
# So many adapters of rank 32, with gradients and moments, take 86 GB on every GPU.
_TENANTS, _TENANTS_RANK = 64, 8


@dataclass(frozen=True)
class Measurement:
    """A model in a layout, and how many adapters of which rank share a pass."""

    name: str
    shape: str  # of SHAPES
    tensor: int
    pipeline: int
    data: int
    tokens_per_gpu: int  # of a pass, so that each GPU has as much of the activations in every layout
    length: int  # of a sequence, at most
    tenants: int = 1
    rank: int = RANK

    @property
    def num_gpus(self) -> int:
        """Ranks that it takes."""
        return self.tensor * self.pipeline * self.data

    @property
    def layout(self) -> str:
        """In words."""
        return f"TP={self.tensor}, PP={self.pipeline}, DP={self.data}"


@dataclass(frozen=True)
class Measured:
    """What came of it. num_parameters: of the base model."""

    name: str
    tokens_per_second: float
    num_parameters: int
    memory_gb: float  # at most, on the first GPU


def measurements(num_gpus: int, quick: bool) -> list[Measurement]:
    """Of the trainer: those that so many GPUs can do and those that they cannot."""

    def measurement(name: str, shape: str, layout: tuple[int, int, int], *adapters: int) -> Measurement:
        model, tokens, length = ("tiny", 256, 32) if quick else (shape, _TOKENS_PER_GPU[shape], 2048)
        return Measurement(f"train.{name}", model, *layout, tokens, length, *adapters)

    def alone(shape: str) -> list[Measurement]:
        return [measurement("{}_tp{}_pp{}_dp{}".format(shape, *each), shape, each) for each in _LAYOUTS[shape]]

    copies = 1 << (num_gpus.bit_length() - 1)
    together = measurement(f"{_TENANTS}_tenants", "8b", (1, 1, copies), _TENANTS, _TENANTS_RANK)
    return [*alone("8b"), together, *alone("70b")]  # what might not fit last: it ends its ranks


def waves(wanted: Sequence[Measurement], num_gpus: int) -> list[list[list[Measurement]]]:
    """What to measure at the same time, on GPUs of its own each: worlds of ranks, each with its measurements."""
    worlds: dict[int, list[Measurement]] = {}
    for measurement in wanted:
        worlds.setdefault(measurement.num_gpus, []).append(measurement)
    result: list[list[list[Measurement]]] = []
    for size in sorted(worlds, reverse=True):
        room = (wave for wave in result if sum(world[0].num_gpus for world in wave) + size <= num_gpus)
        wave = next(room, None)
        if wave is None:
            result.append(wave := [])
        wave.append(worlds[size])
    return result
