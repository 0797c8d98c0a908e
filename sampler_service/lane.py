"""A process that takes parts of payloads for the sampler: python -m sampler_service.lane HOST:PORT"""

import asyncio
import functools
import sys
from collections.abc import AsyncIterator

import grpc

from service_common import children, errors
from service_common.staging import StagingBuffer, StagingPool
from tinkerbell import push_frames
from tinkerbell.payload import Chunk, PartReceiver, PayloadError
from tinkerbell.v1 import sampler_pb2

SERVICE_NAME = sampler_pb2.DESCRIPTOR.services_by_name["LaneService"].full_name


async def take_parts(
    staging: StagingPool,
    frames: AsyncIterator[sampler_pb2.TakePartsRequest | Chunk],
    context: grpc.aio.ServicerContext,
) -> AsyncIterator[sampler_pb2.TakePartsResponse]:
    """The method of the service."""
    await context.send_initial_metadata(())
    buffers: list[StagingBuffer] = []
    receiver: PartReceiver | None = None
    try:
        async for frame in frames:
            if receiver is None:
                if isinstance(frame, Chunk) or not frame.begin.size_bytes:
                    raise errors.invalid_argument(
                        "FRAME_UNEXPECTED", "a part starts with BEGIN and its size", field="begin"
                    )
                buffers.append(_memory(staging, frame.begin.size_bytes))
                receiver = PartReceiver(buffers[-1].view, frame.begin.offset)
                continue
            if not isinstance(frame, Chunk):
                raise errors.invalid_argument("FRAME_UNEXPECTED", "CHUNKs follow BEGIN", field="frame")
            receiver.add(frame)
            if receiver.is_complete:
                receiver = None
                yield sampler_pb2.TakePartsResponse(part_id=buffers[-1].descriptor)
    except PayloadError as cause:
        raise errors.data_loss("PAYLOAD_DAMAGED", f"{cause}; send the part again") from cause
    finally:
        for buffer in buffers:
            buffer.close()


def _memory(staging: StagingPool, size_bytes: int) -> StagingBuffer:
    try:
        return staging.take(size_bytes)
    except (OSError, OverflowError) as cause:
        raise errors.resource_exhausted(
            "OUT_OF_MEMORY",
            f"there is no memory for a part of {size_bytes} bytes: {cause}; send smaller ones",
            size_bytes=size_bytes,
        ) from cause


def _add_to_server(server: grpc.aio.Server) -> None:
    handler = grpc.stream_stream_rpc_method_handler(
        functools.partial(take_parts, StagingPool()),
        push_frames.parsed_part,
        sampler_pb2.TakePartsResponse.SerializeToString,
    )
    server.add_registered_method_handlers(SERVICE_NAME, {"TakeParts": handler})


if __name__ == "__main__":
    asyncio.run(children.serve("lane", sys.argv[1], _add_to_server))
