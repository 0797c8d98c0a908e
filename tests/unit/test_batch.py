"""Checks of training examples."""

import numpy as np
import pytest

from service_common.errors import Code, ServiceError
from trainer_service.batch import Datum, check, num_tokens
from trainer_service.losses import INPUT_DEFAULTS, INPUTS, Loss


def datum(length: int, loss: Loss = Loss.CROSS_ENTROPY, **changed) -> Datum:
    arrays = {"tokens": np.arange(length), "target_tokens": np.arange(length)}
    inputs = {name: np.ones(length, np.float32) for name in INPUTS[loss]}
    for name, array in changed.items():
        (arrays if name in arrays else inputs)[name] = array
    return Datum(**arrays, inputs=inputs)


def refusal(data: list[Datum], loss: Loss = Loss.CROSS_ENTROPY) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        check(data, loss, vocab_size=100, max_sequence_length=60, max_tokens=200)
    assert refused.value.code is Code.INVALID_ARGUMENT
    return refused.value


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


BAD = {
    "BATCH_EMPTY": [],
    "SEQUENCE_LENGTH_OUT_OF_RANGE": [datum(61)],
    "LENGTH_MISMATCH": [datum(3), datum(3, weights=np.ones(4, np.float32))],
    "TOKEN_OUT_OF_RANGE": [datum(3), datum(3, tokens=np.array([0, 1, 100]))],
    "LOSS_INPUT_NOT_FINITE": [datum(3), datum(3, weights=floats(1, np.nan, 1))],
    "LOSS_INPUTS_INVALID": [datum(3), datum(3, advantages=np.ones(3, np.float32))],
    "BATCH_TOO_LARGE": [datum(50)] * 5,
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_batches_are_refused_with_their_reason(reason: str) -> None:
    refused = refusal(BAD[reason])
    assert refused.reason == reason
    assert refused.field


@pytest.mark.parametrize("shape", [(), (1, 3), (2, 3)])
def test_inputs_of_another_shape_are_refused_whatever_they_hold(shape: tuple[int, ...]) -> None:
    weights = np.full(shape, np.nan, np.float32)
    assert refusal([datum(3, weights=weights)]).reason == "LENGTH_MISMATCH"


def test_an_empty_sequence_is_refused() -> None:
    assert refusal([datum(0)]).reason == "SEQUENCE_LENGTH_OUT_OF_RANGE"


def test_negative_and_too_large_tokens_are_named_with_their_place() -> None:
    refused = refusal([datum(3), datum(3, target_tokens=np.array([0, 1, -1]))])
    assert "data[1].target_tokens[2] is -1; token ids go from 0 to 99" in refused.message


@pytest.mark.parametrize("loss", Loss)
def test_each_loss_takes_its_inputs_and_no_others(loss: Loss) -> None:
    check([datum(3, loss)], loss, 100, 60, 200)
    assert refusal([datum(3, loss, other=np.ones(3, np.float32))], loss).reason == "LOSS_INPUTS_INVALID"
    for name in set(INPUTS[loss]) - set(INPUT_DEFAULTS):
        good = datum(3, loss)
        without = {other: array for other, array in good.inputs.items() if other != name}
        refused = refusal([Datum(good.tokens, good.target_tokens, without)], loss)
        assert refused.reason == "LOSS_INPUTS_INVALID"
        assert name in refused.message


def test_logprobs_need_not_be_finite_where_there_is_no_advantage() -> None:
    unused = datum(3, Loss.PPO, logprobs=floats(np.nan, -1, -np.inf), advantages=floats(0, 1, 0))
    check([unused], Loss.PPO, 100, 60, 200)
    used = datum(3, Loss.PPO, logprobs=floats(np.nan, -1, -np.inf), advantages=floats(0, 1, 2))
    assert "data[0].logprobs[2] is -inf" in refusal([used], Loss.PPO).message
    # dro's penalty counts every position.
    assert refusal([datum(3, Loss.DRO, **unused.inputs)], Loss.DRO).reason == "LOSS_INPUT_NOT_FINITE"


def test_tokens_of_a_batch_are_summed() -> None:
    assert num_tokens([datum(3), datum(1), datum(40)]) == 44
