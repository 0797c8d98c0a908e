"""Checks and packing of training examples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service_common.errors import Code, ServiceError
from trainer_service.batch import Datum, check, microbatches


def datum(length: int, **changed) -> Datum:
    fields = {
        "tokens": np.arange(length),
        "target_tokens": np.arange(length),
        "weights": np.ones(length, np.float32),
    }
    return Datum(**{**fields, **changed})


BAD = {
    "BATCH_EMPTY": [],
    "SEQUENCE_LENGTH_OUT_OF_RANGE": [datum(0)],
    "LENGTH_MISMATCH": [datum(3), datum(3, weights=np.ones(4, np.float32))],
    "TOKEN_OUT_OF_RANGE": [datum(3), datum(3, tokens=np.array([0, 1, 100]))],
    "WEIGHT_NOT_FINITE": [datum(3), datum(3, weights=np.array([1, np.nan, 1], np.float32))],
    "BATCH_TOO_LARGE": [datum(50)] * 5,
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_batches_are_refused_with_their_reason(reason: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        check(BAD[reason], vocab_size=100, max_sequence_length=60, max_tokens=200)
    assert refusal.value.code is Code.INVALID_ARGUMENT
    assert refusal.value.reason == reason
    assert refusal.value.field


def test_negative_and_too_large_tokens_are_named_with_their_place() -> None:
    with pytest.raises(ServiceError, match=r"data\[1\]\.target_tokens\[2\] is -1; token ids go from 0 to 99"):
        check([datum(3), datum(3, target_tokens=np.array([0, 1, -1]))], 100, 60, 200)


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 50))
def test_passes_keep_order_and_stay_within_the_budget(lengths: list[int], budget: int) -> None:
    data = [datum(length) for length in lengths]
    passes = list(microbatches(data, budget))
    assert [item for one_pass in passes for item in one_pass] == data
    for one_pass in passes:
        assert len(one_pass) == 1 or sum(len(item.tokens) for item in one_pass) <= budget
    assert all(passes)
