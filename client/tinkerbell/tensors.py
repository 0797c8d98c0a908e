"""numpy arrays to and from `tinkerbell.v1.Tensor`.

numpy has no bfloat16: a bfloat16 tensor arrives as the float32 array of the same values, which is exact, and leaves as
the uint16 array of its bits.
"""

import math

import numpy as np

from tinkerbell.v1 import common_pb2

# Storage type of each wire type. bfloat16 is stored in its 16 bits.
_STORAGE: dict[common_pb2.DataType, np.dtype] = {
    common_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    common_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
    common_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    common_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    common_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
}
_WIRE_TYPE = {storage: wire for wire, storage in _STORAGE.items() if wire != common_pb2.DATA_TYPE_BFLOAT16}

_NAMES: dict[common_pb2.DataType, str] = {
    common_pb2.DATA_TYPE_FLOAT32: "float32",
    common_pb2.DATA_TYPE_BFLOAT16: "bfloat16",
    common_pb2.DATA_TYPE_FLOAT16: "float16",
    common_pb2.DATA_TYPE_INT64: "int64",
    common_pb2.DATA_TYPE_INT32: "int32",
}


def dtype_name(dtype: common_pb2.DataType) -> str:
    """The type's name in numpy and PyTorch, for example "bfloat16". ValueError if it is not a type."""
    if dtype not in _NAMES:
        raise ValueError(f"{dtype} is not a DataType that a tensor can have")
    return _NAMES[dtype]


def dtype_from_name(name: str) -> common_pb2.DataType:
    """The inverse of `dtype_name`."""
    for dtype, known in _NAMES.items():
        if known == name:
            return dtype
    raise ValueError(f"{name!r} is not one of {', '.join(_NAMES.values())}")


def dtype_size(dtype: common_pb2.DataType) -> int:
    """Bytes per element."""
    dtype_name(dtype)
    return _STORAGE[dtype].itemsize


def encode(array: np.ndarray) -> common_pb2.Tensor:
    """Copies a float32, float16, int64 or int32 array of any shape. ValueError on another dtype."""
    storage = array.dtype.newbyteorder("<")
    if storage not in _WIRE_TYPE:
        raise ValueError(f"dtype {array.dtype} does not travel; convert to float32, float16, int64 or int32")
    data = np.ascontiguousarray(array, dtype=storage).tobytes()
    return common_pb2.Tensor(dtype=_WIRE_TYPE[storage], shape=array.shape, data=data)


def decode(tensor: common_pb2.Tensor) -> np.ndarray:
    """A read-only array over the tensor's bytes; for bfloat16, a new float32 array.

    ValueError when the dtype is unknown or the number of bytes does not fit dtype and shape.
    """
    return decode_bytes(tensor.data, tensor.dtype, tensor.shape)


def decode_bytes(data: bytes | memoryview, dtype: common_pb2.DataType, shape) -> np.ndarray:
    """As `decode`, for elements that lie outside a Tensor message."""
    shape = tuple(shape)
    expected = math.prod(shape) * dtype_size(dtype)
    if any(size < 0 for size in shape) or len(data) != expected:
        raise ValueError(f"{dtype_name(dtype)} {list(shape)} takes {expected} bytes, and {len(data)} came")
    array = np.frombuffer(data, dtype=_STORAGE[dtype]).reshape(shape)
    if dtype == common_pb2.DATA_TYPE_BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def rounded(array: np.ndarray, dtype: common_pb2.DataType) -> np.ndarray:
    """float32 rounded to a float type, to nearest, ties to even; bfloat16 as the uint16 array of its bits."""
    if dtype == common_pb2.DATA_TYPE_BFLOAT16:
        bits = array.view(np.uint32)
        nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        # Rounding could carry a NaN over into infinity or zero.
        return np.where(np.isnan(array), bits >> 16 | 0x40, nearest).astype("<u2")
    return array.astype(_STORAGE[dtype])
