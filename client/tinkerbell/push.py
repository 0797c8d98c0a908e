"""The push protocol: one version of an adapter from this process's memory to a sampler's."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from tinkerbell import tensors
from tinkerbell._call_status import CallStatus
from tinkerbell.errors import InternalError, from_rpc_error
from tinkerbell.push_frames import chunk_frames
from tinkerbell.v1 import common_pb2, sampler_pb2

METHOD = "/tinkerbell.v1.SamplerService/PushAdapter"
PARTS_METHOD = "/tinkerbell.v1.LaneService/TakeParts"


async def push(
    channel: grpc.aio.Channel,
    begin: sampler_pb2.PushBegin,
    payload: bytes | memoryview,
    timeout: float | None = None,  # noqa: ASYNC109 - gRPC tells the sampler of its deadline
) -> sampler_pb2.PushCommitted:
    """Pushes one version and returns when the sampler serves it.

    `channel`: to the sampler. `begin`: its manifest has the digest. `payload`: the manifest's size_bytes; none of it is
    sent when the version is live already. `timeout`: seconds for the whole push.

    TinkerbellError as the sampler gives it. Whatever goes wrong before the commit, cancellation included, leaves
    nothing on the sampler; after it, ask again: the same push is a success that moves no bytes.
    """
    stream = PushStream(channel, timeout)
    try:
        if (live := await stream.begin(begin)) is None:
            await stream.send(payload)
            live = await stream.commit()
        return live
    finally:
        stream.close()


class _Stream:
    """A call to which frames go, some of which are answered."""

    def __init__(self, call: Any, receiver: str):
        self._call = call
        self._status = CallStatus(call)
        self._receiver = receiver

    async def _answer(self) -> Any:
        try:
            answer = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(await self._status.error(error), self._receiver) from error
        if answer is grpc.aio.EOF:
            raise InternalError(f"{self._receiver} ended the call before the push had ended")
        return answer

    async def _write(self, request: Any) -> bool:
        """False when the other side has ended the call; reading tells why."""
        try:
            await self._call.write(request)
        except asyncio.InvalidStateError:
            return False
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(await self._status.error(error), self._receiver) from error
        return True

    async def send(self, payload: bytes | memoryview, start: int = 0, end: int | None = None) -> None:
        """Sends a payload, or its bytes from `start` to `end`; what has been announced, whole or in order."""
        for frame in chunk_frames(payload, start, end):
            if not await self._write(frame):
                return  # the next step hears why

    def close(self) -> None:
        """Ends the call. A push before its commit leaves nothing on the sampler, and a lane frees what it has."""
        self._call.cancel()


class PushStream(_Stream):
    """A push step by step, for whoever pushes to several samplers and lets none commit before all are ready.

    The steps are `begin`, `send`, `prepare` if wanted, `commit`. Each raises TinkerbellError as the sampler gives it,
    and ends the push with that.

    lane_ports: where the sampler takes parts of the payload side by side, once the push has begun.
    """

    def __init__(self, channel: grpc.aio.Channel, timeout: float | None = None):
        """`timeout`: seconds for the whole push. Close the stream in the end."""
        # Not a stub's method, so that `send` can serialize by itself.
        method: Any = channel.stream_stream(METHOD, _serialized, sampler_pb2.PushAdapterResponse.FromString)
        super().__init__(method(timeout=timeout), "the sampler")
        self.lane_ports: Sequence[int] = ()

    async def begin(self, begin: sampler_pb2.PushBegin) -> sampler_pb2.PushCommitted | None:
        """Announces a version. When it is live already, that is the answer and the push is over."""
        answer = await self._step(sampler_pb2.PushAdapterRequest(begin=begin), "accepted", "committed")
        if answer.HasField("accepted"):
            self.lane_ports = answer.accepted.lane_ports
            return None
        await self._end()
        return answer.committed

    async def add_part(self, part: sampler_pb2.PushPart) -> None:
        """Names a part that a lane has, in place of sending it."""
        await self._write(sampler_pb2.PushAdapterRequest(part=part))

    async def prepare(self, probes: Sequence[Sequence[int]] = ()) -> list[np.ndarray]:
        """Waits until every rank has the version, which does not make it live.

        Returns one float32 [N - 1] per probe of N tokens: the log-probabilities that the version gives to them.
        """
        frame = sampler_pb2.PushPrepare(probes=[common_pb2.TokenSequence(tokens=tokens) for tokens in probes])
        answer = await self._step(sampler_pb2.PushAdapterRequest(prepare=frame), "prepared")
        return [tensors.decode(tensor) for tensor in answer.prepared.logprobs]

    async def commit(self) -> sampler_pb2.PushCommitted:
        """Makes the version live and ends the push."""
        answer = await self._step(sampler_pb2.PushAdapterRequest(commit=sampler_pb2.PushCommit()), "committed")
        await self._end()
        return answer.committed

    async def _step(self, request: sampler_pb2.PushAdapterRequest, *expected: str) -> sampler_pb2.PushAdapterResponse:
        await self._write(request)
        answer = await self._answer()
        if answer.WhichOneof("frame") not in expected:
            raise InternalError(f"the sampler answered {answer.WhichOneof('frame')}, and not {' or '.join(expected)}")
        return answer

    async def _end(self) -> None:
        # To the end, so that the sampler sees a finished call and not a cancelled one. It has answered already.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._call.done_writing()
            await self._call.read()


class PartsStream(_Stream):
    """Parts of a payload on their way to a sampler's lane, which keeps them until the stream is closed.

    `open`, then `send` for each part and, beside it, `received` for each. TinkerbellError as the lane gives it.
    """

    def __init__(self, channel: grpc.aio.Channel, timeout: float | None = None):
        """`channel`: to the lane. `timeout`: seconds for the push. Close the stream when the push has ended."""
        method: Any = channel.stream_stream(PARTS_METHOD, _serialized, sampler_pb2.TakePartsResponse.FromString)
        super().__init__(method(timeout=timeout), "the lane")

    async def open(self) -> None:
        """Waits until the lane takes parts, or has refused the call, which `received` tells."""
        await self._call.initial_metadata()

    async def send(self, payload: bytes | memoryview, start: int = 0, end: int | None = None) -> None:
        """Sends a payload, or its bytes from `start` to `end`, as one part."""
        size = (len(payload) if end is None else end) - start
        begin = sampler_pb2.PartBegin(offset=start, size_bytes=size)
        if await self._write(sampler_pb2.TakePartsRequest(begin=begin)):
            await super().send(payload, start, end)

    async def received(self) -> int:
        """The id of the next part, in the order in which they are sent, once the lane has all of it."""
        return (await self._answer()).part_id


def _serialized(request: sampler_pb2.PushAdapterRequest | sampler_pb2.TakePartsRequest | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()
