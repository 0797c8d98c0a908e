"""The push protocol: one version of an adapter from this process's memory to a sampler's."""

import asyncio
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


class PushStream:
    """A push step by step, for whoever pushes to several samplers and lets none commit before all are ready.

    The steps are `begin`, `send`, `prepare` if wanted, `commit`. Each raises TinkerbellError as the sampler gives it,
    and ends the push with that.
    """

    METHOD = METHOD

    def __init__(
        self, channel: grpc.aio.Channel, timeout: float | None = None, metadata: Sequence[tuple[str, str]] | None = None
    ):
        """`timeout`: seconds for the whole push. Close the stream in the end."""
        # Not a stub's method, so that `send` can serialize by itself.
        method: Any = channel.stream_stream(self.METHOD, _serialized, sampler_pb2.PushAdapterResponse.FromString)
        self._call = method(timeout=timeout, metadata=metadata)
        self._status = CallStatus(self._call)

    async def begin(self, begin: sampler_pb2.PushBegin) -> sampler_pb2.PushCommitted | None:
        """Announces a version. When it is live already, that is the answer and the push is over."""
        answer = await self._ask(sampler_pb2.PushAdapterRequest(begin=begin), "accepted", "committed")
        if answer.HasField("accepted"):
            return None
        await self._end()
        return answer.committed

    async def send(self, payload: bytes | memoryview) -> None:
        """Sends the whole payload."""
        for frame in chunk_frames(payload):
            if not await self._write(frame):
                return  # the sampler has ended the call; the next step hears why

    async def prepare(self, probes: Sequence[Sequence[int]] = ()) -> list[np.ndarray]:
        """Waits until every rank has the version, which does not make it live.

        Returns one float32 [N - 1] per probe of N tokens: the log-probabilities that the version gives to them.
        """
        frame = sampler_pb2.PushPrepare(probes=[common_pb2.TokenSequence(tokens=tokens) for tokens in probes])
        answer = await self._ask(sampler_pb2.PushAdapterRequest(prepare=frame), "prepared")
        return [tensors.decode(tensor) for tensor in answer.prepared.logprobs]

    async def commit(self) -> sampler_pb2.PushCommitted:
        """Makes the version live and ends the push."""
        answer = await self._ask(sampler_pb2.PushAdapterRequest(commit=sampler_pb2.PushCommit()), "committed")
        await self._end()
        return answer.committed

    def close(self) -> None:
        """Ends the push. Before the commit, that leaves nothing on the sampler."""
        self._call.cancel()

    async def _ask(self, request: sampler_pb2.PushAdapterRequest, *expected: str) -> sampler_pb2.PushAdapterResponse:
        try:
            await self._write(request)
            answer = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(await self._status.error(error), "the sampler") from error
        if answer is grpc.aio.EOF:
            raise InternalError("the sampler ended the push without committing it")
        if answer.WhichOneof("frame") not in expected:
            raise InternalError(f"the sampler answered {answer.WhichOneof('frame')}, and not {' or '.join(expected)}")
        return answer

    async def _write(self, request: sampler_pb2.PushAdapterRequest | bytes) -> bool:
        try:
            return await write(self._call, request)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(await self._status.error(error), "the sampler") from error

    async def _end(self) -> None:
        await self._call.done_writing()
        await self._call.read()  # to the end, so that the sampler sees a finished call and not a cancelled one


async def write(call: Any, request: sampler_pb2.PushAdapterRequest | bytes) -> bool:
    """False when the sampler has ended the call; reading tells why."""
    try:
        await call.write(request)
    except asyncio.InvalidStateError:
        return False
    return True


def _serialized(request: sampler_pb2.PushAdapterRequest | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()
