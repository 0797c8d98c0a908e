"""Calls to a trainer's engine as the service makes them."""

from collections.abc import Sequence

import numpy as np

from trainer_service import losses
from trainer_service.batch import Datum
from trainer_service.engine import Engine
from trainer_service.losses import DEFAULTS, Loss, LossConfig
from trainer_service.passes import Part, PartResult


def part(adapter_id: str, data: Sequence[Datum], loss: Loss = Loss.CROSS_ENTROPY, backward: bool = True) -> Part:
    """One call that fits one pass."""
    return Part(adapter_id, data, loss, DEFAULTS.get(loss, LossConfig()), backward)


def forward_backward(
    engine: Engine, adapter_id: str, data: Sequence[Datum], loss: Loss = Loss.CROSS_ENTROPY, backward: bool = True
) -> PartResult:
    """One adapter alone in a pass. Raises its refusal."""
    (result,) = engine.run_pass([part(adapter_id, data, loss, backward)])
    if result.refusal:
        raise result.refusal
    return result


def metrics(result: PartResult) -> dict[str, float]:
    """As the response has them."""
    return losses.metrics(result.sums)


def arena_of(engine: Engine, adapter_id: str):
    """The adapter's memory."""
    return engine._adapters[adapter_id].arena


def random_datum(rng: np.random.Generator, length: int, vocab_size: int, loss: Loss = Loss.CROSS_ENTROPY) -> Datum:
    """A sequence with plausible inputs for the loss."""
    values = {
        "weights": lambda: rng.uniform(0, 2, length),
        "logprobs": lambda: rng.normal(-6, 0.3, length),
        "advantages": lambda: rng.normal(0, 1, length),
        "logprob_gradients": lambda: rng.normal(0, 1, length),
    }
    return Datum(
        tokens=rng.integers(0, vocab_size, length),
        target_tokens=rng.integers(0, vocab_size, length),
        inputs={name: values[name]().astype(np.float32) for name in losses.INPUTS[loss]},
    )
