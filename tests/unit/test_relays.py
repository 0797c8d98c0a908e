"""Publishing by way of processes that send: as without them, whatever becomes of samplers, pushes and relays."""

import asyncio
import contextlib
import signal

import psutil
import pytest
from sampler_worlds import SamplerWorld, publishing, snapshot, tiny_checkpoint, until

from service_common import errors
from service_common.errors import Code, ServiceError
from trainer_service.publish import relays as relays_module
from trainer_service.publish.relays import Relays
from trainer_service.publish.transaction import ReplicaState


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
async def running():
    """Two processes, which all tests here share."""
    relays = Relays(2, least_bytes=1)
    yield relays
    pids = [relay._process.pid for relay in relays._relays]
    await relays.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.fixture
async def relays(running, monkeypatch):
    """They stay when a publisher closes them, and have given all memory back. A payload is three pieces."""
    with monkeypatch.context() as patch:
        patch.setattr(relays_module, "_PIECE_BYTES", 50)
        patch.setattr(running, "close", lambda: asyncio.sleep(0))
        yield running
    assert running._buffers.used_bytes == 0


@pytest.fixture
async def samplers(checkpoint):
    worlds = [await SamplerWorld(checkpoint).start() for _ in range(3)]
    yield worlds
    for world in worlds:
        await world.stop()


async def test_a_version_reaches_more_samplers_than_there_are_relays(samplers, checkpoint, relays):
    async with publishing(samplers, relays=relays) as publisher:
        first = await publisher.publish("a", snapshot(checkpoint, 1))
        assert [outcome.state for outcome in first.replicas] == [ReplicaState.COMMITTED] * 3
        again = await publisher.publish("a", snapshot(checkpoint, 1))
        assert (again.version, again.sent_bytes) == (1, 0)
        both = await asyncio.gather(
            publisher.publish("a", snapshot(checkpoint, 2)), publisher.publish("b", snapshot(checkpoint, 3))
        )
        assert [publication.version for publication in both] == [2, 1]
    assert [(world.live("a"), world.live("b")) for world in samplers] == [({1: 1.0, 2: 2.0}, {1: 3.0})] * 3


async def test_one_sampler_needs_no_relay(samplers, checkpoint):
    relays = Relays(2, least_bytes=1)
    async with publishing(samplers[:1], relays=relays) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
    assert [relay._process for relay in relays._relays] == [None, None]


async def test_without_relays_a_version_goes_out_all_the_same(samplers, checkpoint, monkeypatch):
    monkeypatch.setattr(relays_module, "_START_SECONDS", 0.5)
    monkeypatch.setattr(relays_module.sys, "executable", "/bin/false")
    async with publishing(samplers, relays=Relays(2, least_bytes=1)) as publisher:
        for content in (1, 2):
            published = await publisher.publish("a", snapshot(checkpoint, content))
            assert [outcome.state for outcome in published.replicas] == [ReplicaState.COMMITTED] * 3


async def test_a_refusal_arrives_with_its_reason_and_leaves_nothing(samplers, checkpoint, relays):
    async with publishing(samplers, relays=relays) as publisher:
        samplers[1].engine.refusal = errors.invalid_argument("TENSOR_NOT_FINITE", "a NaN", tensor="t")
        with pytest.raises(ServiceError) as refusal:
            await publisher.publish("a", snapshot(checkpoint, 2))
        assert (refusal.value.code, refusal.value.reason) == (Code.INVALID_ARGUMENT, "TENSOR_NOT_FINITE")
        assert refusal.value.metadata == {"tensor": "t", "samplers": samplers[1].address}
        await until(lambda: not any(world.engine.installed for world in samplers))
        samplers[1].engine.refusal = None
        await publisher.publish("a", snapshot(checkpoint, 3))
    assert [list(world.live().values()) for world in samplers] == [[3.0]] * 3


async def test_numbers_that_samplers_have_used_are_passed_over(samplers, checkpoint, relays):
    async with publishing(samplers[2:]) as publisher:
        for content in (1, 2):
            await publisher.publish("a", snapshot(checkpoint, content))
    async with publishing(samplers, relays=relays) as publisher:
        assert (await publisher.publish("a", snapshot(checkpoint, 3))).version == 3
    assert [world.live()[3] for world in samplers] == [3.0] * 3


async def test_a_sampler_that_is_down_is_left_out(samplers, checkpoint, relays):
    async with publishing(samplers, relays=relays) as publisher:
        await samplers[1].stop()
        publication = await publisher.publish("a", snapshot(checkpoint, 1))
        states = {outcome.address: outcome.state for outcome in publication.replicas}
        assert states[samplers[1].address] is ReplicaState.DOWN
        assert list(states.values()).count(ReplicaState.COMMITTED) == 2
        await samplers[1].start()


async def test_a_push_that_is_given_up_leaves_nothing(samplers, checkpoint, relays):
    async with publishing(samplers, relays=relays) as publisher:
        samplers[1].engine.go.clear()
        samplers[1].engine.installing.clear()
        push = asyncio.create_task(publisher.publish("a", snapshot(checkpoint, 1)))
        await samplers[1].engine.installing.wait()
        push.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await push
        samplers[1].engine.go.set()
        await until(lambda: not any(world.engine.installed for world in samplers))
        assert (await publisher.publish("a", snapshot(checkpoint, 2))).version >= 1
    assert [list(world.live().values()) for world in samplers] == [[2.0]] * 3


async def test_a_relay_that_is_killed_is_started_again(samplers, checkpoint, relays):
    async with publishing(samplers, relays=relays) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        process = relays._relays[0]._process
        process.send_signal(signal.SIGKILL)
        await process.wait()
        publication = await publisher.publish("a", snapshot(checkpoint, 2))
        assert [outcome.state for outcome in publication.replicas] == [ReplicaState.COMMITTED] * 3
        assert relays._relays[0]._process.pid != process.pid
    assert [world.live() for world in samplers] == [{1: 1.0, 2: 2.0}] * 3
