"""Where the tests' engines run, as pytest's --device says. Base weights are float32 on a CPU and bfloat16 on a GPU."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# "cpu" or "cuda"; conftest.py sets it before test modules are imported.
name = "cpu"


def tolerance(float32: float, bfloat16: float) -> float:
    """The one for where the engines run."""
    return float32 if name == "cpu" else bfloat16


def of_engine() -> "torch.device":
    """For an engine in the test's own process."""
    import torch  # noqa: PLC0415  (most tests need none)

    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def dtype_name() -> str:
    """Of the base weights."""
    return "float32" if name == "cpu" else "bfloat16"


def first_difference(ours: Sequence[int], expected: Sequence[int]) -> int | None:
    """Where two token sequences of one length part. On a CPU they must not."""
    assert len(ours) == len(expected)
    if name == "cpu":
        assert list(ours) == list(expected)
    return next((at for at, pair in enumerate(zip(ours, expected, strict=True)) if pair[0] != pair[1]), None)
