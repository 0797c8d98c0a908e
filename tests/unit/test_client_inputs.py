import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays

from tinkerbell import Datum, tensors
from tinkerbell.v1 import common_pb2

DTYPES = [np.float32, np.float16, np.int64, np.int32]


@given(
    strategies.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    )
)
def test_tensors_survive_the_wire(array):
    message = common_pb2.Tensor.FromString(tensors.encode(array).SerializeToString())
    back = tensors.decode(message)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@given(arrays.arrays(np.float32, 7))
def test_bfloat16_is_widened_exactly(array):
    upper = (array.view(np.uint32) >> 16).astype("<u2")
    tensor = common_pb2.Tensor(dtype="DATA_TYPE_BFLOAT16", shape=[7], data=upper.tobytes())
    assert (tensors.decode(tensor).view(np.uint32) == upper.astype(np.uint32) << 16).all()


def test_tensors_of_the_wrong_size_or_type_are_refused():
    with pytest.raises(ValueError, match="takes 8 bytes, and 7 came"):
        tensors.decode(common_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=[2], data=b"1234567"))
    with pytest.raises(ValueError, match="float64 does not travel"):
        tensors.encode(np.ones(2))


def test_prompt_and_completion_are_shifted_and_weighted():
    datum = Datum.from_prompt_and_completion([10, 11, 12], [20, 21])
    assert datum.tokens.tolist() == [10, 11, 12, 20]
    assert datum.target_tokens.tolist() == [11, 12, 20, 21]
    assert datum.weights.tolist() == [0, 0, 1, 1]
    assert len(datum) == 4


def test_datum_becomes_the_message_of_the_contract():
    message = Datum(tokens=range(3), target_tokens=np.arange(1, 4, dtype=np.int32), weights=[1, 0, 0.5]).to_proto()
    assert message.tokens == [0, 1, 2]
    targets, weights = (tensors.decode(message.loss_inputs[name]) for name in ("target_tokens", "weights"))
    assert (targets.dtype, targets.tolist()) == (np.int64, [1, 2, 3])
    assert (weights.dtype, weights.tolist()) == (np.float32, [1, 0, 0.5])
    assert set(Datum([1], [2]).to_proto().loss_inputs) == {"target_tokens"}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (dict(tokens=[1, 2], target_tokens=[2]), "2 tokens and 1 target_tokens"),
        *(
            ({"tokens": [1, 2], "target_tokens": [2, 3], name: [1]}, rf"2 tokens and {name} of shape \(1,\)")
            for name in ("weights", "logprobs", "advantages", "logprob_gradients")
        ),
        (dict(tokens=[], target_tokens=[]), "at least one token"),
        (dict(tokens=[1.5], target_tokens=[2]), "tokens has dtype float64"),
        (dict(tokens=[2**40], target_tokens=[2]), "do not fit int32"),
        (dict(tokens=[[1]], target_tokens=[2]), r"tokens has shape \(1, 1\)"),
    ],
)
def test_bad_data_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        Datum(**fields)


@pytest.mark.parametrize(("prompt", "completion"), [([], [1]), ([1], [])])
def test_prompt_and_completion_must_not_be_empty(prompt, completion):
    with pytest.raises(ValueError, match="both need at least one"):
        Datum.from_prompt_and_completion(prompt, completion)
