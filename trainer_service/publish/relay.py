"""A process that sends parts of payloads for the trainer: python -m trainer_service.publish.relay unix:PATH

It takes them from memory that it shares with the trainer, to the lanes of samplers.
"""

import asyncio
import functools
import mmap
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from service_common import children
from tinkerbell.errors import TinkerbellError
from tinkerbell.push import PartStream
from trainer_service.publish import channels

METHOD = "/tinkerbell.Relay/SendPart"
# The request: where the part starts and ends in the payload.
RANGE = struct.Struct("<QQ")
# The second answer. The first one is empty, and says that the lane has accepted the part.
PART_ID = struct.Struct("<Q")
# In the call's metadata: the lane's HOST:PORT, and the file with the payload.
LANE_KEY, PAYLOAD_KEY = "lane", "payload"

_channel_to = functools.cache(channels.to_sampler)


async def _send_part(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    """The lane keeps the part as long as this call lasts, which the trainer ends."""
    wanted = {key: str(value) for key, value in context.invocation_metadata() or ()}
    payload = _mapped(Path(wanted[PAYLOAD_KEY]))
    start, end = RANGE.unpack(request)
    part = PartStream(_channel_to(wanted[LANE_KEY]), context.time_remaining())
    try:
        await part.begin(start, end)
        yield b""
        await part.send(payload, start, end)
        yield PART_ID.pack(await part.received())
        await asyncio.Event().wait()
    except TinkerbellError as failure:
        await context.abort(failure.code, str(failure))
    finally:
        part.close()


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _add_to_server(server: grpc.aio.Server) -> None:
    service, method = METHOD.removeprefix("/").split("/")
    server.add_registered_method_handlers(service, {method: grpc.unary_stream_rpc_method_handler(_send_part)})


if __name__ == "__main__":
    asyncio.run(children.serve(sys.argv[1], _add_to_server))
