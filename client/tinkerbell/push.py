"""The push protocol: one version of an adapter from this process's memory to a sampler's."""

import asyncio
from typing import Any

import grpc

from tinkerbell import payload as payloads
from tinkerbell._call_status import CallStatus
from tinkerbell.errors import InternalError, from_rpc_error
from tinkerbell.v1 import sampler_pb2


async def push(
    stub: Any,
    begin: sampler_pb2.PushBegin,
    payload: bytes | memoryview,
    timeout: float | None = None,  # noqa: ASYNC109 - gRPC tells the sampler of its deadline
) -> sampler_pb2.PushCommitted:
    """Pushes one version and returns when the sampler serves it.

    `stub`: a SamplerServiceStub on a grpc.aio channel. `begin`: its manifest has the digest. `payload`: the
    manifest's size_bytes; none of it is sent when the version is live already. `timeout`: seconds for the whole push.

    TinkerbellError as the sampler gives it. Whatever goes wrong before the commit, cancellation included, leaves
    nothing on the sampler; after it, ask again: the same push is a success that moves no bytes.
    """
    call = stub.PushAdapter(timeout=timeout)
    status = CallStatus(call)
    try:
        return await _push(call, begin, payload)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(await status.error(error), "the sampler") from error
    finally:
        call.cancel()


async def _push(call: Any, begin: sampler_pb2.PushBegin, payload: bytes | memoryview) -> sampler_pb2.PushCommitted:
    try:
        await call.write(sampler_pb2.PushAdapterRequest(begin=begin))
        answer = await _answer(call)
        if answer.HasField("accepted"):
            for chunk in payloads.chunks(payload):
                await call.write(sampler_pb2.PushAdapterRequest(chunk=chunk))
            await call.write(sampler_pb2.PushAdapterRequest(commit=sampler_pb2.PushCommit()))
            answer = await _answer(call)
    except asyncio.InvalidStateError:
        # A write found the call ended; reading tells why.
        answer = await _answer(call)
    if not answer.HasField("committed"):
        raise InternalError("the sampler accepted the push a second time instead of committing it")
    await call.done_writing()
    await call.read()  # to the end, so that the sampler sees a finished call and not a cancelled one
    return answer.committed


async def _answer(call: Any) -> sampler_pb2.PushAdapterResponse:
    answer = await call.read()
    if answer is grpc.aio.EOF:
        raise InternalError("the sampler ended the push without committing it")
    return answer
