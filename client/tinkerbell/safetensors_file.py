"""Safetensors files, tensor by tensor (https://huggingface.co/docs/safetensors: a JSON header, then all tensors).

The safetensors package hands numpy no bfloat16, and writes only what is in memory as a whole.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinkerbell import tensors
from tinkerbell.v1 import common_pb2

FLOAT_TYPES = {
    "F32": common_pb2.DATA_TYPE_FLOAT32,
    "BF16": common_pb2.DATA_TYPE_BFLOAT16,
    "F16": common_pb2.DATA_TYPE_FLOAT16,
}
"""Those that adapters and the weights under them can have, by their names in the file."""

_LONGEST_HEADER = 100_000_000  # the safetensors package's own limit
_SAMPLE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    """The file."""
    dtype: str
    """For example "BF16"."""
    shape: tuple[int, ...]
    """Size of each dimension."""
    start: int
    """First byte in the file."""
    size: int
    """Number of bytes."""

    def read(self) -> np.ndarray:
        """The tensor as float32, which is exact. ValueError, naming the dtype, when it is not among `FLOAT_TYPES`."""
        if self.dtype not in FLOAT_TYPES:
            raise ValueError(f"{self.file.name} has a tensor of {self.dtype}; {', '.join(FLOAT_TYPES)} are possible")
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.size)
        return tensors.decode_bytes(data, FLOAT_TYPES[self.dtype], self.shape).astype(np.float32, copy=False)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    tensors: dict[str, StoredTensor]
    """By name, in the order of their bytes."""
    metadata: dict[str, str]
    """Whatever its writer noted."""
    size: int
    """Bytes before the first tensor."""


def read_header(file: Path) -> Header:
    """ValueError when it is no safetensors file."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(stream.read(length))
        metadata = entries.pop("__metadata__", {})
        stored = {name: _stored(file, entry, 8 + length) for name, entry in entries.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise ValueError(f"{file} is not a safetensors file: {cause}") from cause
    in_order = dict(sorted(stored.items(), key=lambda item: item[1].start))
    return Header(in_order, metadata, 8 + length)


def write(stream: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes float32 arrays."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers that map the file want the tensors aligned
    stream.write(struct.pack("<Q", len(text)) + text)
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array, dtype="<f4").data)


def checkpoint_fingerprint(folder: Path) -> str:
    """`fingerprint` of the Hugging Face checkpoint in a folder."""
    stored: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored.update(read_header(file).tensors)
    return fingerprint(stored)


def fingerprint(stored: Mapping[str, StoredTensor]) -> str:
    """`BaseModelInfo.fingerprint`: sha256 over every tensor's name, dtype, shape and 4 KiB from its start, middle and
    end.

    Sampled, since hashing 140 GB at every start would take minutes. It tells a fine-tuned model from its base.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        sha.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with tensor.file.open("rb") as stream:
            last = max(tensor.size - _SAMPLE_BYTES, 0)
            for position in (0, last // 2, last):
                stream.seek(tensor.start + position)
                sha.update(stream.read(min(_SAMPLE_BYTES, tensor.size)))
    return sha.hexdigest()


def _stored(file: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(file, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)
