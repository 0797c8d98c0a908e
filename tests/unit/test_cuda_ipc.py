"""Who reads weights out of the trainer's GPU memory, and what happens to all others. The memory is a stand-in."""

import asyncio
import contextlib
from unittest.mock import Mock

import pytest
import sampler_worlds
import torch
from sampler_worlds import SamplerWorld, SharedMemory, snapshot, tiny_checkpoint, until

from sampler_service.device_memory import DeviceMemory
from sampler_service.lanes import Lanes
from service_common.cuda_ipc import host_id
from service_common.errors import Code, ServiceError
from trainer_service.publish import cuda_ipc as cuda_ipc_module
from trainer_service.publish import publisher as publisher_module
from trainer_service.publish.cuda_ipc import CudaIpc
from trainer_service.publish.relays import Relays
from trainer_service.publish.transaction import Transport


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(publisher_module, "_WATCH_SECONDS", 0.05)
    monkeypatch.setattr(cuda_ipc_module, "SharedMemory", SharedMemory)
    monkeypatch.setattr(SharedMemory, "all", {})


@contextlib.asynccontextmanager
async def publishing(*worlds, on=True, relays=None):
    cuda_ipc = CudaIpc(torch.device("cpu")) if on else None
    async with sampler_worlds.publishing(worlds, adapter_ids="abcdef", cuda_ipc=cuda_ipc, relays=relays) as publisher:
        await until(lambda: all(replica.dtype for replica in publisher._in_order()))  # all of them have been asked
        yield publisher


@contextlib.asynccontextmanager
async def sampler(checkpoint, device="cuda", cuda_ipc=True, lanes=None):
    world = await SamplerWorld(checkpoint, device, cuda_ipc, lanes).start()
    try:
        yield world
    finally:
        await world.stop()


async def publish(publisher, content, transport=Transport.UNSPECIFIED, adapter_id="a"):
    async with publisher.staged(content.manifest.size_bytes, transport) as staged:
        if staged and staged.fill:
            staged.fill(torch.frombuffer(bytearray(content.payload), dtype=torch.float32))
        return await publisher.publish(adapter_id, content, None, staged, transport)


async def test_a_sampler_on_the_same_host_reads_the_memory_and_opens_it_once(checkpoint):
    async with sampler(checkpoint) as world, publishing(world) as publisher:
        for content in (1, 2, 3):
            published = await publish(publisher, snapshot(checkpoint, content))
            assert published.transport is Transport.CUDA_IPC
            assert published.replicas[0].no_cuda_ipc == ""
        assert world.live() == {2: 2.0, 3: 3.0}
        assert len(world.engine.opened) == 1
        again = await publish(publisher, snapshot(checkpoint, 3))
        assert (again.transport, again.sent_bytes) == (Transport.UNSPECIFIED, 0)
        assert (await publish(publisher, snapshot(checkpoint, 4), Transport.GRPC)).transport is Transport.GRPC
    await until(lambda: not world.engine.opened)


@pytest.mark.parametrize(
    ("device", "on", "reason"), [("cuda", False, "without --cuda-ipc"), ("cpu", True, "without --cuda-ipc")]
)
async def test_a_sampler_that_does_not_takes_chunks_and_the_answer_says_why(checkpoint, device, on, reason):
    async with (
        sampler(checkpoint, device, on) as without,
        sampler(checkpoint) as world,
        publishing(without, world) as publisher,
    ):
        published = await publish(publisher, snapshot(checkpoint, 1))
        by_address = {outcome.address: outcome for outcome in published.replicas}
        assert by_address[world.address].transport is Transport.CUDA_IPC
        assert by_address[without.address].transport is Transport.GRPC
        assert reason in by_address[without.address].no_cuda_ipc
        assert published.transport is Transport.GRPC
        assert without.live() == world.live() == {1: 1.0}
        with pytest.raises(ServiceError, match=reason) as refusal:
            await publish(publisher, snapshot(checkpoint, 2), Transport.CUDA_IPC)
        assert (refusal.value.code, refusal.value.reason) == (Code.FAILED_PRECONDITION, "CUDA_IPC_UNAVAILABLE")
        assert without.live() == world.live() == {1: 1.0}


@pytest.mark.slow
async def test_samplers_beside_it_get_parts_from_relays(checkpoint):
    relays, lanes = Relays(2, least_bytes=1), Lanes("127.0.0.1", 2)
    await asyncio.gather(relays.started(), lanes.started())
    lanes.read = Mock(side_effect=lanes.read)
    async with (
        sampler(checkpoint) as world,
        sampler(checkpoint, "cpu", lanes=lanes) as first,
        sampler(checkpoint, "cpu", lanes=lanes) as second,
        publishing(world, first, second, relays=relays) as publisher,
    ):
        published = await publish(publisher, snapshot(checkpoint, 1))
        by_address = {outcome.address: outcome.transport for outcome in published.replicas}
        assert by_address.pop(world.address) is Transport.CUDA_IPC
        assert list(by_address.values()) == [Transport.GRPC] * 2
        assert lanes.read.call_count == 2
        assert [each.live() for each in (world, first, second)] == [{1: 1.0}] * 3
    await lanes.close()


async def test_another_host_and_a_gpu_out_of_reach_take_chunks(checkpoint, monkeypatch):
    async with sampler(checkpoint) as world:
        world.engine.unreachable = "invalid device context"
        async with publishing(world) as publisher:
            for content in (1, 2):
                (outcome,) = (await publish(publisher, snapshot(checkpoint, content))).replicas
                assert outcome.transport is Transport.GRPC
                assert "invalid device context" in outcome.no_cuda_ipc
        monkeypatch.setattr(cuda_ipc_module, "host_id", lambda: "elsewhere")
        async with publishing(world) as publisher:
            (outcome,) = (await publish(publisher, snapshot(checkpoint, 3))).replicas
            assert outcome.no_cuda_ipc == "the sampler is on another host"
        assert set(world.live().values()) == {2.0, 3.0}


async def test_a_trainer_whose_gpu_is_full_sends_chunks_until_there_is_memory(checkpoint, monkeypatch):
    async with sampler(checkpoint) as world, publishing(world) as publisher:
        monkeypatch.setattr(SharedMemory, "lacking", "cudaErrorMemoryAllocation: out of memory")
        (outcome,) = (await publish(publisher, snapshot(checkpoint, 1))).replicas
        assert (outcome.transport, SharedMemory.all) == (Transport.GRPC, {})
        assert outcome.no_cuda_ipc == "the trainer's GPU has no room: cudaErrorMemoryAllocation: out of memory"
        with pytest.raises(ServiceError, match="out of memory") as refusal:
            await publish(publisher, snapshot(checkpoint, 2), Transport.CUDA_IPC)
        assert refusal.value.reason == "CUDA_IPC_UNAVAILABLE"
        monkeypatch.setattr(SharedMemory, "lacking", "")
        assert (await publish(publisher, snapshot(checkpoint, 2))).transport is Transport.CUDA_IPC
        assert world.live() == {1: 1.0, 2: 2.0}


async def test_a_trainer_without_it_refuses_to_use_it(checkpoint):
    async with sampler(checkpoint) as world, publishing(world, on=False) as publisher:
        assert (await publish(publisher, snapshot(checkpoint, 1))).transport is Transport.GRPC
        with pytest.raises(ServiceError) as refusal:
            await publish(publisher, snapshot(checkpoint, 2), Transport.CUDA_IPC)
        assert refusal.value.reason == "CUDA_IPC_UNAVAILABLE"


async def test_a_sampler_that_restarts_opens_the_memory_again(checkpoint):
    async with sampler(checkpoint) as world, publishing(world) as publisher:
        await publish(publisher, snapshot(checkpoint, 1))
        await world.stop()
        await world.start()
        await until(lambda: world.live() == {1: 1.0})  # healed, over gRPC
        assert (await publish(publisher, snapshot(checkpoint, 2))).transport is Transport.CUDA_IPC
        assert world.live() == {1: 1.0, 2: 2.0}


async def test_memory_that_is_being_read_is_not_written(checkpoint):
    async with sampler(checkpoint) as world, publishing(world) as publisher:
        world.engine.go.clear()
        publications = [
            asyncio.create_task(publish(publisher, snapshot(checkpoint, content), adapter_id=adapter_id))
            for content, adapter_id in enumerate("abcdef", 1)
        ]
        await until(lambda: len(SharedMemory.all) == 4)  # and two wait
        await asyncio.sleep(0.1)
        world.engine.go.set()
        for published in await asyncio.gather(*publications):
            assert published.transport is Transport.CUDA_IPC
        assert [world.live(adapter_id) for adapter_id in "abcdef"] == [{1: float(n)} for n in range(1, 7)]
        assert len(SharedMemory.all) == 4


async def test_larger_payloads_take_the_place_of_smaller_ones(checkpoint):
    async with sampler(checkpoint) as world, publishing(world) as publisher:
        async with contextlib.AsyncExitStack() as small:
            for _ in range(4):
                await small.enter_async_context(publisher.staged(8, Transport.CUDA_IPC))
        assert (await publish(publisher, snapshot(checkpoint, 1))).transport is Transport.CUDA_IPC
        assert sorted(map(len, SharedMemory.all.values()))[:2] == [0, 8]
        assert world.live() == {1: 1.0}


async def test_only_memory_that_is_open_and_large_enough_can_have_a_payload():
    opened = {}

    async def open_(memory_id, handle, size_bytes):
        opened[memory_id] = handle, size_bytes

    async def close(memory_id):
        del opened[memory_id]

    memory = DeviceMemory(True, open_, close)
    async with memory.opened(b"h" * 64, 100, host_id()) as memory_id:
        assert opened == {memory_id: (b"h" * 64, 100)}
        memory.check(memory_id, 100)
        with pytest.raises(ServiceError, check=lambda error: error.reason == "PAYLOAD_TOO_LARGE"):
            memory.check(memory_id, 101)
    assert opened == {}
    with pytest.raises(ServiceError, check=lambda error: error.reason == "DEVICE_MEMORY_NOT_FOUND"):
        memory.check(memory_id, 1)
    for off, handle, host, reason in (
        (False, b"h" * 63, host_id(), "HANDLE_INVALID"),
        (False, b"h" * 64, "elsewhere", "CUDA_IPC_UNREACHABLE"),
        (True, b"h" * 64, host_id(), "CUDA_IPC_OFF"),
    ):
        with pytest.raises(ServiceError, check=lambda error, reason=reason: error.reason == reason):
            async with DeviceMemory(not off, open_, close).opened(handle, 1, host):
                pass
