"""The import protocol: an adapter's weights from this process's memory to the trainer's."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tinkerbell import payload as payloads
from tinkerbell import peft_folder
from tinkerbell._call_status import CallStatus
from tinkerbell.errors import from_rpc_error
from tinkerbell.lora import LoraConfig
from tinkerbell.v1 import trainer_pb2

Weights = Mapping[str, np.ndarray] | str | os.PathLike[str]
"""By PEFT name, A [rank, in] and B [out, rank], of any float type up to 32 bits; or a PEFT folder."""


def read(
    weights: Weights,
    rank: int | None,
    alpha: float | None,
    use_rslora: bool | None,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """An adapter's shape and its weights as float32. ValueError as `TrainerClient.import_adapter_weights` says."""
    shape = {
        "rank": rank,
        "alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    if not isinstance(weights, Mapping):
        given = [name for name, value in shape.items() if value is not None]
        if given:
            raise ValueError(f"the folder's {peft_folder.CONFIG} says {' and '.join(given)}; leave it out")
        return peft_folder.read(Path(weights))
    if rank is None or alpha is None:
        raise ValueError("weights that are not in a PEFT folder need rank and alpha")
    arrays = {name: _float32(name, array) for name, array in weights.items()}
    return LoraConfig.of_weights(arrays, rank, alpha, bool(use_rslora), rank_pattern, alpha_pattern), arrays


def read_for(lora: LoraConfig, weights: Weights) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """As `read`, for an adapter that exists: weights that are not in a folder have its shape."""
    if not isinstance(weights, Mapping):
        return read(weights, None, None, None, None, None)
    return read(weights, lora.rank, lora.alpha, lora.use_rslora, lora.rank_pattern, lora.alpha_pattern)


async def send(
    stub: Any,
    begin: trainer_pb2.ImportBegin,
    payload: bytes,
    timeout: float | None,  # noqa: ASYNC109 - gRPC tells the trainer of its deadline
    peer: str,
) -> trainer_pb2.ImportAdapterWeightsResponse | None:
    """One import, from BEGIN to COMMIT. `peer` names the trainer in errors.

    None when it was done before, and grpc.aio lost the answer since it came while a chunk was being written.
    """
    call = stub.ImportAdapterWeights(timeout=timeout)
    status = CallStatus(call)
    try:
        try:
            await call.write(trainer_pb2.ImportAdapterWeightsRequest(begin=begin))
            for chunk in payloads.chunks(payload):
                await call.write(trainer_pb2.ImportAdapterWeightsRequest(chunk=chunk))
            await call.write(trainer_pb2.ImportAdapterWeightsRequest(commit=trainer_pb2.ImportCommit()))
            await call.done_writing()
        except asyncio.InvalidStateError:
            pass  # the call has ended: refused, or done before, and its answer tells which
        return await call
    except grpc.aio.AioRpcError as error:
        answer = await status.error(error)
        if answer.code() == grpc.StatusCode.OK:
            return None
        raise from_rpc_error(answer, peer) from error
    finally:
        call.cancel()


def _float32(name: str, array: np.ndarray) -> np.ndarray:
    # numpy's own bfloat16 is an extension, whose kind is not "f".
    if (array.dtype.kind != "f" and array.dtype.name != "bfloat16") or array.dtype.itemsize > 4:
        raise ValueError(f"tensor {name!r} has dtype {array.dtype}; float32, float16 and bfloat16 are possible")
    return array.astype(np.float32, copy=False)
