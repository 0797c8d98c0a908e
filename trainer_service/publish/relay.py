"""A process that sends payloads for the trainer: python -m trainer_service.publish.relay SOCKET

It takes the frames of a push from the trainer and hands them on to a sampler, and the answers back. The payload, nearly
all of a push's bytes, it takes from memory that it shares with the trainer. Ends when the trainer does.
"""

import asyncio
import functools
import mmap
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from service_common.rpc import MAX_MESSAGE_BYTES
from tinkerbell import push
from tinkerbell._call_status import CallStatus
from tinkerbell.push_frames import chunk_frames
from trainer_service.publish import channels

METHOD = "/tinkerbell.Relay/Push"
# Stands for the chunks of a piece of the payload: a zero, with which no message begins, and where it starts and ends.
PIECE = struct.Struct("<xQQ")
# In the call's metadata: the sampler's HOST:PORT, and the file with the payload.
SAMPLER_KEY, PAYLOAD_KEY = "sampler", "payload"

_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]

_channel_to = functools.cache(channels.to_sampler)


async def _relayed(frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    """Every frame but the payload's has one answer. The call ends as the sampler's does."""
    wanted = {key: str(value) for key, value in context.invocation_metadata() or ()}
    payload = _mapped(Path(wanted[PAYLOAD_KEY]))
    method: Any = _channel_to(wanted[SAMPLER_KEY]).stream_stream(push.METHOD)  # its stub asks for serializers
    call = method(timeout=context.time_remaining())
    status = CallStatus(call)
    try:
        async for frame in frames:
            if frame.startswith(b"\0"):
                await _send_piece(call, payload, *PIECE.unpack(frame))
                continue
            await push.write(call, frame)
            answer = await call.read()
            if answer is grpc.aio.EOF:
                return
            yield answer
        await call.done_writing()
        await call.read()  # to the end, so that the sampler sees a finished call and not a cancelled one
    except grpc.aio.AioRpcError as raised:
        error = await status.error(raised)
        await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
    finally:
        call.cancel()


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


async def _send_piece(call: Any, payload: memoryview, start: int, end: int) -> None:
    for frame in chunk_frames(payload, start, end):
        if not await push.write(call, frame):
            return  # the sampler has ended the call; what follows hears why


async def _serve(socket: str) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    service, method = METHOD.removeprefix("/").split("/")
    server.add_registered_method_handlers(service, {method: grpc.stream_stream_rpc_method_handler(_relayed)})
    server.add_insecure_port(socket)
    await server.start()
    await _end_of_input()
    await server.stop(0)


async def _end_of_input() -> None:
    """The trainer has the other end of it, and the system closes that when the trainer is gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
