"""An adapter's weights as numpy arrays, to and from a manifest with its payload."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import numpy as np

from tinkerbell import payload, tensors
from tinkerbell.errors import DataLossError
from tinkerbell.lora import LoraConfig
from tinkerbell.v1 import common_pb2


def pack(
    weights: Mapping[str, np.ndarray], lora: LoraConfig, base_model_fingerprint: str
) -> tuple[common_pb2.AdapterManifest, bytes]:
    """Manifest, digest included, and payload of an adapter.

    `weights`: by PEFT name, A [rank, in] and B [out, rank], all float32 or all float16. ValueError, naming the tensor,
    when a dtype can't travel.
    """
    manifest = common_pb2.AdapterManifest(lora=lora.to_proto(), base_model_fingerprint=base_model_fingerprint)
    parts = []
    for name, array in weights.items():
        tensor = tensors.encode(array)
        size = len(tensor.data)
        manifest.tensors.add(
            name=name, dtype=tensor.dtype, shape=tensor.shape, offset=manifest.size_bytes, size_bytes=size
        )
        manifest.size_bytes += size
        parts.append(tensor.data)
    payload.check_layout(manifest)
    whole = b"".join(parts)
    manifest.digest = payload.digest(manifest, whole)
    return manifest, whole


async def unpack(
    manifest: common_pb2.AdapterManifest, frames: AsyncGenerator[Any, None]
) -> AsyncGenerator[tuple[str, np.ndarray], None]:
    """(PEFT name, array) of each tensor as soon as its bytes are there; bfloat16 comes as float32.

    `frames`: messages with chunks, of which it takes as many as the manifest announces. DataLossError when a chunk is
    damaged or, after the last tensor, when the payload as a whole does not have the manifest's digest.
    """
    try:
        payload.check_layout(manifest)
        buffer = bytearray(manifest.size_bytes)
        view = memoryview(buffer).toreadonly()
        receiver = payload.Receiver(manifest, buffer)
        for spec in manifest.tensors:
            end = spec.offset + spec.size_bytes
            while receiver.received < end:
                frame = await anext(frames, None)
                if frame is None:
                    break
                receiver.add(frame.chunk)
            if receiver.received < end:
                break
            yield spec.name, tensors.decode_bytes(view[spec.offset : end], spec.dtype, spec.shape)
        receiver.finish()
    except payload.PayloadError as error:
        raise DataLossError(str(error), reason="PAYLOAD_DAMAGED") from error
