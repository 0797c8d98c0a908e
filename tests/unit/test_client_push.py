"""How a payload is cut into frames of the push protocol."""

import numpy as np
import pytest

from tinkerbell.payload import CHUNK_BYTES, chunks
from tinkerbell.push import _chunk_frames
from tinkerbell.v1 import sampler_pb2


@pytest.mark.parametrize("size", [1, 127, 128, CHUNK_BYTES, 70 * CHUNK_BYTES + 300])
def test_frames_are_those_that_protobuf_writes(size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    expected = [sampler_pb2.PushAdapterRequest(chunk=chunk).SerializeToString() for chunk in chunks(content)]
    assert list(_chunk_frames(memoryview(content))) == expected
