"""Publishing by way of processes that send and take parts: as without them, whatever becomes of whom."""

import asyncio
import contextlib
import threading
from unittest.mock import Mock

import psutil
import pytest
from sampler_worlds import SamplerWorld, publishing, snapshot, tiny_checkpoint, until

from sampler_service.lanes import Lanes
from service_common import children, errors
from service_common.errors import Code, ServiceError
from trainer_service.publish import relays as relays_module
from trainer_service.publish.relays import Relays
from trainer_service.publish.transaction import ReplicaState


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
async def running():
    """Two relays, and two lanes that all samplers share."""
    relays, lanes = Relays(2, least_bytes=1), Lanes("127.0.0.1", 2)
    await asyncio.gather(relays.started(), lanes.started())
    yield relays, lanes
    pids = [child.pid for child in (*relays.running(), *lanes.running())]
    await asyncio.gather(relays.close(), lanes.close())
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.fixture
async def relays(running, monkeypatch):
    """They stay when a publisher closes them, and have given all memory back. A payload is three parts."""
    relays, _ = running
    await relays.started()
    with monkeypatch.context() as patch:
        patch.setattr(relays_module, "_PART_BYTES", 50)
        patch.setattr(relays, "close", lambda: asyncio.sleep(0))
        yield relays
    assert relays._staging.used_bytes == 0


@pytest.fixture
def parts(running, monkeypatch):
    """What samplers have read from lanes."""
    _, lanes = running
    read = Mock(side_effect=lanes.read)
    monkeypatch.setattr(lanes, "read", read)
    return read


@pytest.fixture
async def samplers(checkpoint, running):
    worlds = [await SamplerWorld(checkpoint, lanes=running[1]).start() for _ in range(3)]
    yield worlds
    for world in worlds:
        await world.stop()


async def test_one_sampler_gets_its_payload_in_parts_side_by_side(samplers, checkpoint, relays, parts):
    async with publishing(samplers[:1], relays=relays) as publisher:
        published = await publisher.publish("a", snapshot(checkpoint, 1))
    size = snapshot(checkpoint, 1).manifest.size_bytes
    assert published.sent_bytes == size
    taken = [part for part, _ in (call.args for call in parts.call_args_list)]
    assert sorted((part.offset, part.size_bytes) for part in taken) == [(0, 50), (50, 50), (100, size - 100)]
    assert len({part.lane_port for part in taken}) == 2
    assert samplers[0].live() == {1: 1.0}


async def test_parts_are_read_while_others_are_on_their_way_and_chunks_bring_what_lanes_do_not(
    samplers, checkpoint, relays, parts, running, monkeypatch
):
    copy, go = relays_module._copy, threading.Event()
    read, done = parts.side_effect, []

    def copy_the_last_one_late(snapshot, shared, start, end):
        if start == 100:
            assert go.wait(10)
        copy(snapshot, shared, start, end)

    def remember(part, target):
        read(part, target)
        done.append(part)

    monkeypatch.setattr(relays_module, "_copy", copy_the_last_one_late)
    parts.side_effect = remember
    async with publishing(samplers[:1], relays=relays) as publisher:
        push = asyncio.create_task(publisher.publish("a", snapshot(checkpoint, 1)))
        await until(lambda: len(done) == 2)
        lanes = [psutil.Process(lane.pid) for lane in running[1].running()]
        for lane in lanes:
            lane.kill()
        psutil.wait_procs(lanes)
        go.set()
        await push
    assert samplers[0].live() == {1: 1.0}
    assert parts.call_count == 2
    await until(lambda: len(running[1].ports()) == 2)


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


async def test_without_relays_a_version_goes_out_all_the_same(samplers, checkpoint, monkeypatch, parts):
    monkeypatch.setattr(children.sys, "executable", "/bin/false")
    relays = Relays(2, least_bytes=1)
    await relays.started()
    async with publishing(samplers, relays=relays) as publisher:
        for content in (1, 2):
            published = await publisher.publish("a", snapshot(checkpoint, content))
            assert [outcome.state for outcome in published.replicas] == [ReplicaState.COMMITTED] * 3
    assert not relays.running()
    assert not parts.called


async def test_a_sampler_without_lanes_gets_chunks(samplers, checkpoint, relays, parts):
    alone = await SamplerWorld(checkpoint).start()
    async with publishing([alone, samplers[0]], relays=relays) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
    assert [world.live() for world in (alone, samplers[0])] == [{1: 1.0}] * 2
    assert parts.call_count == 3
    await alone.stop()


async def test_lanes_that_do_not_answer_are_passed_by(samplers, checkpoint, relays, parts, running, monkeypatch):
    monkeypatch.setattr(relays_module, "_ACCEPT_SECONDS", 0.2)
    stopped = [psutil.Process(lane.pid) for lane in running[1].running()]
    for lane in stopped:
        lane.suspend()
    async with publishing(samplers[:1], relays=relays) as publisher:
        for content in (1, 2):
            await publisher.publish("a", snapshot(checkpoint, content))
    assert relays._unreachable == {("127.0.0.1", port) for port in running[1].ports()}
    relays._unreachable.clear()
    for lane in stopped:
        lane.resume()
    assert samplers[0].live() == {1: 1.0, 2: 2.0}
    assert not parts.called


async def test_a_lane_that_is_gone_is_done_without(samplers, checkpoint, relays, parts, running):
    _, lanes = running
    ports = lanes.ports()
    gone = lanes.running()[0]
    process = psutil.Process(gone.pid)
    process.kill()
    psutil.wait_procs([process])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "ports", lambda: ports)  # as when it dies after BEGIN
        async with publishing(samplers[:1], relays=relays) as publisher:
            await publisher.publish("a", snapshot(checkpoint, 1))
    assert samplers[0].live() == {1: 1.0}
    assert not parts.called
    await until(lambda: len(lanes.ports()) == 2)


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


async def test_a_relay_that_is_killed_is_started_again(samplers, checkpoint, relays, parts):
    async with publishing(samplers, relays=relays) as publisher:
        killed = relays.running()[0]
        pid = killed.pid
        killed._process.kill()
        publication = await publisher.publish("a", snapshot(checkpoint, 1))
        assert [outcome.state for outcome in publication.replicas] == [ReplicaState.COMMITTED] * 3
        await until(lambda: len(relays.running()) == 2)
        assert killed.pid != pid
        parts.reset_mock()
        await publisher.publish("a", snapshot(checkpoint, 2))
    assert parts.call_count == 9
    assert [world.live() for world in samplers] == [{1: 1.0, 2: 2.0}] * 3
