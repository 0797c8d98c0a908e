"""A process that takes parts of payloads for the sampler: python -m sampler_service.lane HOST:PORT"""

import asyncio
import functools
import sys
from collections.abc import AsyncIterator

import grpc

from service_common import children, errors
from service_common.staging import StagingPool
from tinkerbell import push_frames
from tinkerbell.payload import Chunk, PartReceiver, PayloadError
from tinkerbell.v1 import sampler_pb2

SERVICE_NAME = sampler_pb2.DESCRIPTOR.services_by_name["LaneService"].full_name


async def take_part(
    staging: StagingPool,
    frames: AsyncIterator[sampler_pb2.TakePartRequest | Chunk],
    context: grpc.aio.ServicerContext,
) -> AsyncIterator[sampler_pb2.TakePartResponse]:
    """The method of the service."""
    first = await anext(aiter(frames), None)
    if not isinstance(first, sampler_pb2.TakePartRequest) or not first.begin.size_bytes:
        raise errors.invalid_argument("FRAME_UNEXPECTED", "a part starts with BEGIN and its size", field="begin")
    try:
        buffer = staging.take(first.begin.size_bytes)
    except (OSError, OverflowError) as cause:
        raise errors.resource_exhausted(
            "OUT_OF_MEMORY",
            f"there is no memory for a part of {first.begin.size_bytes} bytes: {cause}; send smaller ones",
            size_bytes=first.begin.size_bytes,
        ) from cause
    try:
        yield sampler_pb2.TakePartResponse(accepted=sampler_pb2.PartAccepted())
        receiver = PartReceiver(buffer.view, first.begin.offset)
        async for frame in frames:
            if not isinstance(frame, Chunk):
                raise errors.invalid_argument("FRAME_UNEXPECTED", "CHUNKs follow BEGIN", field="frame")
            try:
                receiver.add(frame)
            except PayloadError as cause:
                raise errors.data_loss("PAYLOAD_DAMAGED", f"{cause}; send the part again") from cause
            if receiver.is_complete:
                received = sampler_pb2.PartReceived(part_id=buffer.descriptor)
                yield sampler_pb2.TakePartResponse(received=received)
    finally:
        buffer.close()


def _add_to_server(server: grpc.aio.Server) -> None:
    handler = grpc.stream_stream_rpc_method_handler(
        functools.partial(take_part, StagingPool()),
        push_frames.parsed_part,
        sampler_pb2.TakePartResponse.SerializeToString,
    )
    server.add_registered_method_handlers(SERVICE_NAME, {"TakePart": handler})


if __name__ == "__main__":
    asyncio.run(children.serve(sys.argv[1], _add_to_server))
