"""The frames that carry a payload, laid out and read by hand (https://protobuf.dev/programming-guides/encoding).

Each byte is copied once on either side. Messages would copy it three times, and a push would take half as long again.
"""

from collections.abc import Iterator

from tinkerbell.payload import CHUNK_BYTES, Chunk
from tinkerbell.v1 import common_pb2, sampler_pb2


def chunk_frames(payload: bytes | memoryview, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """A payload, or its bytes from `start` to `end`, as serialized PushAdapterRequests with a chunk each.

    TakePartsRequests with one look the same.
    """
    view = memoryview(payload)[:end]
    for offset in range(start, len(view), CHUNK_BYTES):
        data = view[offset : offset + CHUNK_BYTES]
        head = common_pb2.PayloadChunk(offset=offset).SerializeToString() + _DATA + _varint(len(data))
        yield b"".join((_CHUNK, _varint(len(head) + len(data)), head, data))


def parsed(frame: bytes) -> sampler_pb2.PushAdapterRequest | Chunk:
    """Any serialized PushAdapterRequest. protobuf's DecodeError if it is none."""
    return _usual_chunk(frame) or _any_chunk(sampler_pb2.PushAdapterRequest.FromString(frame))


def parsed_part(frame: bytes) -> sampler_pb2.TakePartsRequest | Chunk:
    """The same of a TakePartsRequest."""
    return _usual_chunk(frame) or _any_chunk(sampler_pb2.TakePartsRequest.FromString(frame))


def _any_chunk[Request: (sampler_pb2.PushAdapterRequest, sampler_pb2.TakePartsRequest)](
    request: Request,
) -> Request | Chunk:
    return Chunk(request.chunk.offset, memoryview(request.chunk.data)) if request.HasField("chunk") else request


def _usual_chunk(frame: bytes) -> Chunk | None:
    """A chunk whose fields are in the order in which every library writes them; None for everything else."""
    if not frame.startswith(_CHUNK):
        return None
    try:
        size, position = _read_varint(frame, 1)
        if position + size != len(frame):
            return None
        offset = 0
        if frame.startswith(_OFFSET, position):
            offset, position = _read_varint(frame, position + 1)
        if not frame.startswith(_DATA, position):
            return None
        size, position = _read_varint(frame, position + 1)
    except IndexError:
        return None
    if position + size != len(frame) or offset >= 1 << 64:  # protobuf drops what is above
        return None
    return Chunk(offset, memoryview(frame)[position:])


def _tag(field_number: int, wire_type: int) -> bytes:
    return bytes([field_number << 3 | wire_type])


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first; all but the last byte have the eighth bit."""
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def _read_varint(frame: bytes, position: int) -> tuple[int, int]:
    """The number and the position after it. IndexError when the frame ends before it does."""
    number = shift = 0
    while True:
        byte = frame[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7


_CHUNK = _tag(sampler_pb2.PushAdapterRequest.CHUNK_FIELD_NUMBER, 2)
_OFFSET = _tag(common_pb2.PayloadChunk.OFFSET_FIELD_NUMBER, 0)
_DATA = _tag(common_pb2.PayloadChunk.DATA_FIELD_NUMBER, 2)
