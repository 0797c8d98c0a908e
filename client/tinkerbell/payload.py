"""An adapter in transit: manifest, digest, chunks.

The payload is all tensors back to back; `protos/tinkerbell/v1/common.proto` (AdapterManifest) defines it and its
digest. Export and push use the same frames, so this module serves client, trainer and sampler alike.
"""

import functools
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from blake3 import blake3

from tinkerbell import tensors
from tinkerbell.v1 import common_pb2

# Below gRPC's default message limit of 4 MiB, and quickest there: a call for each piece is what smaller ones cost, and
# larger ones leave the processor's cache before they have been copied.
CHUNK_BYTES = 1 << 20

_FLOAT_TYPES = {
    common_pb2.DATA_TYPE_FLOAT32,
    common_pb2.DATA_TYPE_BFLOAT16,
    common_pb2.DATA_TYPE_FLOAT16,
}


class PayloadError(ValueError):
    """The bytes that came are not the bytes that were announced."""


def build_manifest(
    lora: common_pb2.LoraConfig,
    named_shapes: Iterable[tuple[str, Sequence[int]]],
    dtype: common_pb2.DataType,
    base_model_fingerprint: str,
) -> common_pb2.AdapterManifest:
    """Lays the tensors out in the given order. The digest stays empty until the payload is known."""
    manifest = common_pb2.AdapterManifest(lora=lora, base_model_fingerprint=base_model_fingerprint)
    for name, shape in named_shapes:
        size = math.prod(shape) * tensors.dtype_size(dtype)
        manifest.tensors.add(name=name, dtype=dtype, shape=shape, offset=manifest.size_bytes, size_bytes=size)
        manifest.size_bytes += size
    return manifest


def check_layout(manifest: common_pb2.AdapterManifest) -> None:
    """PayloadError, naming the tensor, unless the manifest describes a whole, gapless payload."""
    if not manifest.tensors:
        raise PayloadError("the manifest lists no tensors")
    offset = 0
    seen = set()
    for spec in manifest.tensors:
        if spec.name in seen:
            raise PayloadError(f"tensor {spec.name!r} is listed twice")
        seen.add(spec.name)
        if spec.dtype not in _FLOAT_TYPES:
            raise PayloadError(
                f"tensor {spec.name!r} has dtype {spec.dtype}; float32, bfloat16 and float16 are possible"
            )
        if spec.dtype != manifest.tensors[0].dtype:
            raise PayloadError(f"tensor {spec.name!r} has another dtype than the tensors before it")
        if any(size < 1 for size in spec.shape):
            raise PayloadError(f"tensor {spec.name!r} has shape {list(spec.shape)}")
        size = math.prod(spec.shape) * tensors.dtype_size(spec.dtype)
        if spec.size_bytes != size or spec.offset != offset:
            raise PayloadError(
                f"tensor {spec.name!r} must take {size} bytes at offset {offset}, "
                f"and the manifest says {spec.size_bytes} at {spec.offset}"
            )
        offset += size
    if manifest.size_bytes != offset:
        raise PayloadError(f"the tensors take {offset} bytes, and the manifest says {manifest.size_bytes}")


def layout(manifest: common_pb2.AdapterManifest) -> bytes:
    """The manifest without its digest, serialized; the same for all adapters of one shape on one base model.

    What takes long per tensor and depends on nothing else is worth keeping by this.
    """
    bare = common_pb2.AdapterManifest()
    bare.CopyFrom(manifest)
    bare.ClearField("digest")
    return bare.SerializeToString(deterministic=True)


def digest_header(manifest: common_pb2.AdapterManifest) -> bytes:
    """The text that the digest covers before the payload."""
    return _header(layout(manifest))


@functools.lru_cache(maxsize=64)
def _header(serialized: bytes) -> bytes:
    manifest = common_pb2.AdapterManifest.FromString(serialized)
    lora = manifest.lora
    scaling = "rslora" if lora.use_rslora else "lora"
    lines = [
        "tinkerbell.v1.adapter",
        f"{manifest.base_model_fingerprint} {lora.rank} {_exact(lora.alpha)} {scaling}",
        *(f"rank {path} {rank}" for path, rank in sorted(lora.rank_pattern.items())),
        *(f"alpha {path} {_exact(alpha)}" for path, alpha in sorted(lora.alpha_pattern.items())),
    ]
    for spec in manifest.tensors:
        shape = ",".join(str(size) for size in spec.shape)
        lines.append(f"{spec.name} {tensors.dtype_name(spec.dtype)} {shape}")
    return ("\n".join(lines) + "\n\n").encode("ascii", errors="backslashreplace")


def _exact(number: float) -> str:
    return struct.pack(">d", number).hex()


def digest(manifest: common_pb2.AdapterManifest, payload: bytes | memoryview) -> str:
    """The digest of an adapter; `manifest` need not have it yet. Large payloads take all cores."""
    return digest_of(manifest, blake3(payload, max_threads=blake3.AUTO).digest())


def digest_of(manifest: common_pb2.AdapterManifest, payload_hash: bytes) -> str:
    """The same from the payload's 32-byte BLAKE3."""
    return blake3(digest_header(manifest) + payload_hash).hexdigest()


def chunks(payload: bytes | memoryview) -> Iterator[common_pb2.PayloadChunk]:
    """Cuts the payload into chunks of `CHUNK_BYTES`."""
    view = memoryview(payload)
    for offset in range(0, len(view), CHUNK_BYTES):
        yield common_pb2.PayloadChunk(offset=offset, data=bytes(view[offset : offset + CHUNK_BYTES]))


class Chunk(NamedTuple):
    """As PayloadChunk, the data being part of the frame that it came in."""

    offset: int
    data: memoryview


class PartReceiver:
    """Collects the chunks of a payload, or of a part of one, into a buffer of its size.

    received: where in the payload the next one has to start.
    """

    def __init__(self, buffer: bytearray | memoryview, start: int = 0):
        """`buffer`: writable. `start`: of the part, in the payload."""
        self._buffer = memoryview(buffer)
        self._start = self.received = start

    @property
    def is_complete(self) -> bool:
        """Whether all has come."""
        return self.received == self._start + len(self._buffer)

    def add(self, chunk: common_pb2.PayloadChunk | Chunk) -> None:
        """PayloadError when the chunk is out of order or too much."""
        data = chunk.data  # a message's is a new object every time
        self.room(chunk.offset, len(data))[:] = data

    def room(self, offset: int, size_bytes: int) -> memoryview:
        """Where the next bytes belong; they count as received. PayloadError as `add`."""
        if offset != self.received:
            raise PayloadError(f"expected the bytes from offset {self.received} on, got those from {offset} on")
        end, size = offset + size_bytes, self._start + len(self._buffer)
        if end > size:
            raise PayloadError(f"the bytes from offset {offset} on end at {end}, after the announced {size} bytes")
        self.received = end
        return self._buffer[offset - self._start : end - self._start]


class Receiver(PartReceiver):
    """Collects a whole payload and proves that it is what was announced."""

    def __init__(self, manifest: common_pb2.AdapterManifest, buffer: bytearray | memoryview):
        """`buffer`: writable, `manifest.size_bytes` long."""
        super().__init__(buffer)
        self._manifest = manifest

    def finish(self) -> None:
        """PayloadError unless the whole payload came and has the announced digest. Takes all cores for milliseconds."""
        if not self.is_complete:
            raise PayloadError(f"{self.received} of {self._manifest.size_bytes} bytes came before the end")
        came = digest(self._manifest, self._buffer)
        if came != self._manifest.digest:
            raise PayloadError(f"the payload has digest {came}, and {self._manifest.digest!r} was announced")
