"""Processes that take parts of payloads for a sampler."""

import asyncio
import os
import signal
from unittest.mock import AsyncMock

import grpc
import psutil
import pytest
from sampler_worlds import until

from sampler_service.lane import take_parts
from sampler_service.lanes import Lanes
from service_common import staging
from service_common.errors import Code, ServiceError
from service_common.staging import StagingPool
from tinkerbell.errors import InvalidArgumentError
from tinkerbell.payload import Chunk, PayloadError
from tinkerbell.push import PARTS_METHOD, PartsStream
from tinkerbell.v1 import sampler_pb2

CONTENT = os.urandom(3 << 20)


@pytest.fixture(scope="module")
async def lanes():
    lanes = Lanes("127.0.0.1", 2)
    await lanes.started()
    yield lanes
    pids = [child.pid for child in lanes.running()]
    await lanes.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def named(port: int, part_id: int) -> sampler_pb2.PushPart:
    return sampler_pb2.PushPart(lane_port=port, part_id=part_id)


async def test_a_lane_keeps_parts_as_long_as_their_call_lasts(lanes):
    port = lanes.ports()[1]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(2):  # the second time in memory that has been used
            stream = PartsStream(channel)
            await stream.open()
            parts = {}
            for start, end in ((10, 2 << 20), (2 << 20, len(CONTENT))):
                await stream.send(CONTENT, start, end)
                parts[await stream.received()] = CONTENT[start:end]
            for part_id, content in parts.items():
                target = bytearray(len(content))
                lanes.read(named(port, part_id), memoryview(target))
                assert target == content
            stream.close()


async def test_nothing_is_read_but_parts_that_lanes_have(lanes):
    port = lanes.ports()[0]
    for lane, part_id in ((port, 0), (port, 10**6), (1, 5)):
        with pytest.raises(PayloadError, match=f"port {lane} has no part {part_id}"):
            lanes.read(named(lane, part_id), memoryview(bytearray(8)))


async def test_a_refusal_of_a_lane_arrives(lanes):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{lanes.ports()[0]}") as channel:
        with pytest.raises(InvalidArgumentError, match="starts with BEGIN"):
            stream = PartsStream(channel)
            await stream.send(b"", 0, 0)
            await stream.received()


async def test_a_lane_that_refuses_all_the_time_goes_on_and_ends():
    """What it logs must not fill the pipe through which it has told its port."""
    lanes = Lanes("127.0.0.1", 2)
    await lanes.started()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{lanes.ports()[0]}") as channel:
        method = channel.stream_stream(PARTS_METHOD)
        for _ in range(20):
            calls = [method(iter([b""]), timeout=10) for _ in range(60)]  # frames without content
            assert set(await asyncio.gather(*(call.code() for call in calls))) == {grpc.StatusCode.INVALID_ARGUMENT}
    pid = lanes.running()[0].pid
    async with asyncio.timeout(4):
        await lanes.close()
    assert not psutil.pid_exists(pid)


async def test_a_lane_that_is_killed_is_started_again(lanes):
    killed = lanes.running()[0].pid
    os.kill(killed, signal.SIGKILL)
    await until(lambda: len(lanes.running()) == 1)
    await lanes.started()
    assert killed not in [lane.pid for lane in lanes.running()]
    assert len(lanes.ports()) == 2


def begin(offset: int, size: int) -> sampler_pb2.TakePartsRequest:
    return sampler_pb2.TakePartsRequest(begin=sampler_pb2.PartBegin(offset=offset, size_bytes=size))


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([sampler_pb2.TakePartsRequest()], Code.INVALID_ARGUMENT),
        ([Chunk(0, memoryview(b"12"))], Code.INVALID_ARGUMENT),
        ([begin(0, 4), begin(0, 4)], Code.INVALID_ARGUMENT),
        ([begin(4, 4), Chunk(0, memoryview(b"12"))], Code.DATA_LOSS),
        ([begin(4, 4), Chunk(4, memoryview(b"12345"))], Code.DATA_LOSS),
        ([begin(0, 1 << 63)], Code.RESOURCE_EXHAUSTED),
        ([begin(4, 2), Chunk(4, memoryview(b"12")), Chunk(6, memoryview(b"3"))], Code.INVALID_ARGUMENT),
        ([begin(4, 2), Chunk(4, memoryview(b"12")), begin(0, 1 << 63)], Code.RESOURCE_EXHAUSTED),
    ],
)
async def test_what_is_no_part_is_refused_and_takes_no_memory(frames, code):
    async def sent():
        for frame in frames:
            yield frame

    pool = StagingPool()
    with pytest.raises(ServiceError) as refused:
        async for _ in take_parts(pool, sent(), AsyncMock()):
            pass
    assert refused.value.code is code
    assert pool.used_bytes == 0


def test_too_few_cores_have_no_lanes(monkeypatch):
    counts = {}
    for cores in (2, 7, 8, 16, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        counts[cores] = len(Lanes("127.0.0.1")._children)
    assert counts == {2: 0, 7: 0, 8: 2, 16: 4, 64: 4}


def test_a_buffer_is_read_by_its_process_and_descriptor_alone(tmp_path):
    buffer = StagingPool().take(5)
    buffer.view[:] = b"12345"
    target = bytearray(4)
    staging.read(os.getpid(), buffer.descriptor, memoryview(target))
    assert target == b"1234"
    with pytest.raises(OSError, match="5 of 6 bytes"):
        staging.read(os.getpid(), buffer.descriptor, memoryview(bytearray(6)))
    with (tmp_path / "other").open("wb") as file, pytest.raises(OSError, match="no staging buffer"):
        staging.read(os.getpid(), file.fileno(), memoryview(target))
    buffer.free()
