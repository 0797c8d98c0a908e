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
from tinkerbell.push import PartsStream
from trainer_service.publish import channels

METHOD = "/tinkerbell.Relay/SendParts"
# The requests: where a part starts and ends in the payload, which is there as far as that. The initial metadata comes
# when the lane takes parts.
RANGE = struct.Struct("<QQ")
# The answers, in the same order: the lane has the part.
PART_ID = struct.Struct("<Q")
# In the call's metadata: the lane's HOST:PORT, and the file with the payload.
LANE_KEY, PAYLOAD_KEY = "lane", "payload"

_channel_to = functools.cache(channels.to_sampler)


async def _send_parts(ranges: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    """The lane keeps the parts as long as this call lasts."""
    wanted = {key: str(value) for key, value in context.invocation_metadata() or ()}
    payload = _mapped(Path(wanted[PAYLOAD_KEY]))
    lane = PartsStream(_channel_to(wanted[LANE_KEY]), context.time_remaining())
    sending = asyncio.create_task(_send_each(ranges, payload, lane))
    try:
        await lane.open()
        await context.send_initial_metadata(())
        while True:
            yield PART_ID.pack(await lane.received())
    except TinkerbellError as failure:
        await context.abort(failure.code, str(failure))
    finally:
        lane.close()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _send_each(ranges: AsyncIterator[bytes], payload: memoryview, lane: PartsStream) -> None:
    async for start_and_end in ranges:
        await lane.send(payload, *RANGE.unpack(start_and_end))


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _add_to_server(server: grpc.aio.Server) -> None:
    service, method = METHOD.removeprefix("/").split("/")
    server.add_registered_method_handlers(service, {method: grpc.stream_stream_rpc_method_handler(_send_parts)})


if __name__ == "__main__":
    asyncio.run(children.serve("relay", sys.argv[1], _add_to_server))
