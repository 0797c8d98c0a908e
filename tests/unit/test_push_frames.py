"""Frames laid out and read by hand are those that protobuf writes and reads."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from tinkerbell.payload import CHUNK_BYTES, Chunk, chunks
from tinkerbell.push_frames import chunk_frames, parsed
from tinkerbell.v1 import common_pb2, sampler_pb2

_OFFSETS = st.one_of(st.integers(0, 300), st.integers(0, (1 << 64) - 1))


@pytest.mark.parametrize("size", [1, 127, 128, CHUNK_BYTES, 70 * CHUNK_BYTES + 300])
def test_a_payload_is_cut_into_the_frames_that_protobuf_writes(size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    expected = [sampler_pb2.PushAdapterRequest(chunk=chunk).SerializeToString() for chunk in chunks(content)]
    assert list(chunk_frames(memoryview(content))) == expected
    pieces = [chunk_frames(content, start, start + 3 * CHUNK_BYTES) for start in range(0, size, 3 * CHUNK_BYTES)]
    assert [frame for piece in pieces for frame in piece] == expected


@given(offset=_OFFSETS, data=st.binary(max_size=300))
def test_a_chunk_arrives_as_it_was_written(offset: int, data: bytes) -> None:
    request = sampler_pb2.PushAdapterRequest(chunk=common_pb2.PayloadChunk(offset=offset, data=data))
    assert parsed(request.SerializeToString()) == Chunk(offset, memoryview(data))


def test_the_bytes_of_a_chunk_are_not_copied() -> None:
    frame = next(chunk_frames(bytes(CHUNK_BYTES)))
    chunk = parsed(frame)
    assert isinstance(chunk, Chunk)
    assert chunk.data.obj is frame


def test_the_other_frames_are_messages() -> None:
    for request in (
        sampler_pb2.PushAdapterRequest(),
        sampler_pb2.PushAdapterRequest(begin=sampler_pb2.PushBegin(adapter_id="a", version=3)),
        sampler_pb2.PushAdapterRequest(prepare=sampler_pb2.PushPrepare()),
        sampler_pb2.PushAdapterRequest(commit=sampler_pb2.PushCommit()),
    ):
        assert parsed(request.SerializeToString()) == request


@given(frame=st.binary(max_size=12))
@example(b"\x12\x07\x12\x03abc\x08\x05")  # a chunk with the data first
@example(b"\x12\x05\x12\x03abc\x12\x04\x12\x02de")  # two in one: the fields merge, the last value stays
@example(b"\x12\x04\x12\x02ab\x78\x01")  # a field that this version does not know
@example(b"\x12\x0c\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x12")  # cut off
@example(b"\x12\x80\x00\x01")  # a length in more bytes than it needs
def test_anything_else_is_what_protobuf_makes_of_it(frame: bytes) -> None:
    try:
        request = sampler_pb2.PushAdapterRequest.FromString(frame)
    except DecodeError:
        with pytest.raises(DecodeError):
            parsed(frame)
        return
    if request.HasField("chunk"):
        assert parsed(frame) == Chunk(request.chunk.offset, memoryview(request.chunk.data))
    else:
        assert parsed(frame) == request
