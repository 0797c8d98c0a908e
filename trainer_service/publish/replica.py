"""One sampler, as the trainer sees it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from tinkerbell import payload, tensors
from tinkerbell.errors import DeadlineExceededError, InternalError, TinkerbellError, UnavailableError, from_rpc_error
from tinkerbell.push import PushStream, push
from tinkerbell.v1 import common_pb2, sampler_pb2, sampler_pb2_grpc
from trainer_service.publish import channels
from trainer_service.snapshot import Snapshot

# A sampler that does not answer a question for this long is down. It answers them between two steps of its engine.
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Served:
    """The latest version of an adapter on a sampler."""

    version: int
    digest: str


class Replica:
    """Calls to one sampler. They raise TinkerbellError; `is_down` tells whether that means it is not there."""

    def __init__(self, address: str):
        """`address`: HOST:PORT."""
        self.address = address
        self.host = address.rpartition(":")[0]
        self.dtype = common_pb2.DATA_TYPE_UNSPECIFIED  # of its weights, once it has answered
        self.current_instance = ""  # the process that was found to have every current version
        self.cuda_ipc_host = ""  # the host of a sampler that takes payloads by CUDA IPC
        self.cuda_ipc_obstacle = ""  # why that has failed with the process that answers there now
        self._instance = ""
        self._channel = channels.to_sampler(address)
        self._stub = sampler_pb2_grpc.SamplerServiceStub(self._channel)

    async def instance(self) -> str:
        """The id of the process that answers there now; hears of its element type and host on the way."""
        info = await self._call(self._stub.GetBackendInfo, sampler_pb2.SamplerServiceGetBackendInfoRequest())
        self.dtype = info.base_model.dtype
        self.cuda_ipc_host = info.cuda_ipc_host
        if info.instance_id != self._instance:
            self._instance, self.cuda_ipc_obstacle = info.instance_id, ""
        return info.instance_id

    async def served(self) -> dict[str, Served]:
        """What it has, by adapter."""
        response = await self._call(self._stub.ListAdapters, sampler_pb2.ListAdaptersRequest())
        return {
            adapter.adapter_id: Served(adapter.latest_version, adapter.versions[-1].digest)
            for adapter in response.adapters
        }

    def push(self) -> PushStream:
        """A new push, for a transaction; close it in the end."""
        return PushStream(self._channel, channels.PUSH_SECONDS)

    async def open_device_memory(self, handle: bytes, size_bytes: int) -> tuple[grpc.aio.Call, str]:
        """Lets it open GPU memory: a call, as long as which the memory stays open, and the memory's id there."""
        call = self._stub.OpenDeviceMemory(
            sampler_pb2.OpenDeviceMemoryRequest(handle=handle, size_bytes=size_bytes, host=self.cuda_ipc_host)
        )
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                answer = await call.read()
        except TimeoutError:
            call.cancel()
            raise DeadlineExceededError(
                f"{self.address} did not open GPU memory within {_ANSWER_SECONDS:g} s"
            ) from None
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from failure
        if answer is grpc.aio.EOF:
            raise InternalError(f"{self.address} ended the call for GPU memory without an answer")
        return call, answer.memory_id

    async def push_whole(self, begin: sampler_pb2.PushBegin, content: memoryview) -> None:
        """Makes a version live on this sampler alone; nothing is sent when it is."""
        await push(self._channel, begin, content, channels.PUSH_SECONDS)

    async def read(self, adapter_id: str, version: int) -> Snapshot:
        """A version as it was pushed. PayloadError when it arrives damaged."""
        request = sampler_pb2.ExportAdapterVersionRequest(adapter_id=adapter_id, version=version)
        try:
            frames = self._stub.ExportAdapterVersion(request, timeout=channels.PUSH_SECONDS)
            manifest = (await frames.read()).head.manifest
            buffer = bytearray(manifest.size_bytes)
            receiver = payload.Receiver(manifest, buffer)
            while (frame := await frames.read()) is not grpc.aio.EOF:
                receiver.add(frame.chunk)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from failure
        await asyncio.to_thread(receiver.finish)
        return Snapshot(manifest, memoryview(buffer))

    async def score(self, adapter_id: str, version: int, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """As Probe.logprobs, by a live version."""
        request = sampler_pb2.ComputeLogprobsRequest(
            adapter_id=adapter_id,
            version=version,
            sequences=[common_pb2.TokenSequence(tokens=tokens) for tokens in sequences],
        )
        response = await self._call(self._stub.ComputeLogprobs, request, channels.PUSH_SECONDS)
        return [tensors.decode(tensor) for tensor in response.logprobs]

    async def confirm_current(self) -> None:
        """Tells it that it has every current version."""
        await self._call(self._stub.ConfirmCurrent, sampler_pb2.ConfirmCurrentRequest())

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def _call(self, method, request, seconds: float = _ANSWER_SECONDS):
        try:
            return await method(request, timeout=seconds)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from failure


def is_down(failure: TinkerbellError) -> bool:
    """Whether a sampler that fails so is not there, or not yet, or no longer, rather than unwilling."""
    return isinstance(failure, UnavailableError | DeadlineExceededError)
