"""Publishing to several samplers: all or none, and all of them current again."""

import asyncio
import errno
import socket

import pytest
from sampler_worlds import SamplerWorld, publishing, scores, snapshot, tiny_checkpoint, until

from service_common import errors
from service_common.errors import Code, ServiceError
from tinkerbell.errors import UnavailableError
from tinkerbell.push import PushStream
from trainer_service.metrics import Metrics
from trainer_service.publish import publisher as publisher_module
from trainer_service.publish.discovery import Discovery
from trainer_service.publish.parity import Probe
from trainer_service.publish.publisher import Publisher
from trainer_service.publish.relays import Relays
from trainer_service.publish.transaction import ReplicaState

ANSWERED = PushStream.commit
SEQUENCES = [[1, 2, 3], [4, 5]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(publisher_module, "_WATCH_SECONDS", 0.05)


@pytest.fixture
async def samplers(checkpoint):
    worlds = [await SamplerWorld(checkpoint).start() for _ in range(2)]
    yield worlds
    for world in worlds:
        await world.stop()


def states(publication):
    return [outcome.state for outcome in publication.replicas]


def refused(reason):
    return pytest.raises(ServiceError, check=lambda error: error.reason == reason)


async def test_a_version_reaches_every_sampler_and_the_same_weights_travel_once(samplers, checkpoint):
    reserved = []
    async with publishing(samplers, reserved=reserved) as publisher:
        first = await publisher.publish("a", snapshot(checkpoint, 1))
        assert (first.version, states(first)) == (1, [ReplicaState.COMMITTED] * 2)
        assert first.sent_bytes == 2 * len(snapshot(checkpoint, 1).payload)
        again = await publisher.publish("a", snapshot(checkpoint, 1))
        assert (again.version, again.sent_bytes, states(again)) == (1, 0, [ReplicaState.ALREADY_LIVE] * 2)
        assert (await publisher.publish("a", snapshot(checkpoint, 2))).version == 2
        assert publisher.version("a") == 2
    assert [world.live() for world in samplers] == [{1: 1.0, 2: 2.0}] * 2
    assert reserved == [("a", 1), ("a", 2)]


async def test_when_one_sampler_refuses_none_changes_and_the_error_names_it(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        samplers[1].engine.refusal = errors.invalid_argument("TENSOR_NOT_FINITE", "a NaN", tensor="t")
        with pytest.raises(ServiceError) as refusal:
            await publisher.publish("a", snapshot(checkpoint, 2))
        assert (refusal.value.code, refusal.value.reason) == (Code.INVALID_ARGUMENT, "TENSOR_NOT_FINITE")
        assert refusal.value.metadata == {"tensor": "t", "samplers": samplers[1].address}
        assert "1 of 2" in refusal.value.message
        assert samplers[0].address not in refusal.value.message
        assert [world.live() for world in samplers] == [{1: 1.0}] * 2
        await until(lambda: [len(world.engine.installed) for world in samplers] == [1, 1])
        samplers[1].engine.refusal = None
        assert (await publisher.publish("a", snapshot(checkpoint, 3))).version == 3  # 2 may have been seen
    assert [world.live() for world in samplers] == [{1: 1.0, 3: 3.0}] * 2


async def test_a_sampler_that_dies_before_all_are_ready_changes_nothing(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        samplers[1].engine.go.clear()
        samplers[1].engine.installing.clear()
        push = asyncio.create_task(publisher.publish("a", snapshot(checkpoint, 2)))
        await samplers[1].engine.installing.wait()
        await samplers[1].stop()
        with pytest.raises(ServiceError) as refusal:
            await push
        assert (refusal.value.code, refusal.value.reason) == (Code.UNAVAILABLE, "PUSH_FAILED")
        assert refusal.value.metadata["samplers"] == samplers[1].address
        assert samplers[0].live() == {1: 1.0}
        samplers[1].engine.go.set()
        publication = await publisher.publish("a", snapshot(checkpoint, 2))
        assert sorted(state.name for state in states(publication)) == ["COMMITTED", "DOWN"]
        assert samplers[0].live() == {1: 1.0, publication.version: 2.0}
        await samplers[1].start()


async def test_a_sampler_that_was_down_is_brought_up_to_date_before_it_is_told_so(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        await until(lambda: all(world.sampler.current.is_set() for world in samplers))
        await publisher.publish("a", snapshot(checkpoint, 1))
        await samplers[1].stop()
        publication = await publisher.publish("a", snapshot(checkpoint, 2))
        (down,) = [outcome for outcome in publication.replicas if outcome.state is ReplicaState.DOWN]
        assert (down.address, down.sent_bytes) == (samplers[1].address, 0)
        assert down.error
        await publisher.publish("b", snapshot(checkpoint, 7))
        await samplers[1].start()
        samplers[1].engine.go.clear()
        await asyncio.wait_for(samplers[1].engine.installing.wait(), 20)
        assert not samplers[1].sampler.current.is_set()
        samplers[1].engine.go.set()
        await until(samplers[1].sampler.current.is_set)
        assert samplers[1].live("a") == {2: 2.0}
        assert samplers[1].live("b") == {1: 7.0}


async def test_without_any_sampler_nothing_is_published(checkpoint):
    world = SamplerWorld(checkpoint)
    publisher = Publisher(Discovery([world.address]), None, Metrics(), Relays(0))
    publisher.manage("a")
    publisher.start()
    with refused("SAMPLER_UNREACHABLE"):
        await publisher.data_type()
    with refused("SAMPLER_UNREACHABLE"):
        await publisher.publish("a", snapshot(checkpoint, 1))
    await publisher.close()


async def test_a_new_trainer_goes_on_with_the_versions_and_hands_them_on(samplers, checkpoint):
    async with publishing(samplers[:1]) as publisher:
        for content in (1, 2, 3):
            await publisher.publish("a", snapshot(checkpoint, content))
    # The second sampler is new, and this publisher has never seen the weights of version 3.
    async with publishing(samplers) as publisher:
        await until(lambda: all(world.sampler.current.is_set() for world in samplers))
        assert samplers[1].live() == {3: 3.0}
        assert publisher.version("a") == 3
        same = await publisher.publish("a", snapshot(checkpoint, 3))
        assert (same.version, same.sent_bytes) == (3, 0)
        assert (await publisher.publish("a", snapshot(checkpoint, 4))).version == 4


async def test_version_numbers_outlive_trainer_and_samplers(samplers, checkpoint):
    async with publishing(samplers, used=9) as publisher:
        assert publisher.version("a") == 9
        assert (await publisher.publish("a", snapshot(checkpoint, 1))).version == 10


async def test_samplers_that_differ_come_together(samplers, checkpoint):
    """A trainer that was killed between two commits has left one sampler behind."""
    for worlds, content in ((samplers, 1), (samplers[:1], 2)):
        async with publishing(worlds) as publisher:
            await until(lambda: all(world.sampler.current.is_set() for world in worlds))  # noqa: B023
            await publisher.publish("a", snapshot(checkpoint, content))
    assert [max(world.live()) for world in samplers] == [2, 1]
    async with publishing(samplers):
        await until(lambda: max(samplers[1].live()) == 2)
    assert samplers[1].live()[2] == 2.0


async def test_a_number_that_a_sampler_has_used_is_passed_over_everywhere(samplers, checkpoint):
    async with publishing(samplers[1:]) as publisher:
        for content in (1, 2):
            await publisher.publish("a", snapshot(checkpoint, content))
    publisher = Publisher(Discovery([world.address for world in samplers]), _no_reserve, Metrics(), Relays(0))
    publisher.manage("a")
    await publisher._look_up()  # and never looks at what they have
    assert (await publisher.publish("a", snapshot(checkpoint, 3))).version == 3
    assert [world.live()[3] for world in samplers] == [3.0, 3.0]
    await publisher.close()


async def test_verification_refuses_what_a_sampler_computes_differently(samplers, checkpoint):
    probe = Probe(SEQUENCES, scores(2.0, SEQUENCES))
    async with publishing(samplers) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        samplers[1].engine.off_by = 0.5
        with pytest.raises(ServiceError) as refusal:
            await publisher.publish("a", snapshot(checkpoint, 2), probe)
        assert (refusal.value.code, refusal.value.reason) == (Code.FAILED_PRECONDITION, "SAMPLER_DISAGREES")
        assert refusal.value.metadata["samplers"] == samplers[1].address
        assert float(refusal.value.metadata["mean_difference"]) == 0.5
        await until(lambda: [len(world.engine.installed) for world in samplers] == [1, 1])
        assert [world.live() for world in samplers] == [{1: 1.0}] * 2
        samplers[1].engine.off_by = 0.005
        published = await publisher.publish("a", snapshot(checkpoint, 2), probe)
        means = {outcome.address: outcome.difference.mean for outcome in published.replicas}
        assert means[samplers[0].address] == 0.0
        assert means[samplers[1].address] == pytest.approx(0.005, rel=1e-3)
        assert all(outcome.difference.tokens == 3 for outcome in published.replicas)
        drift = publisher._metrics.registry.get_sample_value("tinkerbell_trainer_sampler_drift", {"adapter_id": "a"})
        assert drift == pytest.approx(0.005, rel=1e-3)


async def test_a_number_that_is_none_does_not_agree(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        with refused("SAMPLER_DISAGREES"):
            await publisher.publish("a", snapshot(checkpoint, 2), Probe(SEQUENCES, scores(float("nan"), SEQUENCES)))


async def test_comparing_says_how_far_training_has_gone_since(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        with refused("NOT_PUBLISHED"):
            await publisher.compare("a", 0, Probe(SEQUENCES, scores(1.0, SEQUENCES)))
        await publisher.publish("a", snapshot(checkpoint, 1, step=5))
        await samplers[1].stop()
        current, steps, comparisons = await publisher.compare("a", 8, Probe(SEQUENCES, scores(1.25, SEQUENCES)))
        assert (current.version, steps) == (1, 3)
        by_address = {comparison.address: comparison for comparison in comparisons}
        assert by_address[samplers[0].address].difference.mean == 0.25
        assert not by_address[samplers[0].address].difference.agrees
        assert by_address[samplers[1].address].difference is None
        assert by_address[samplers[1].address].error
        await samplers[1].start()


async def test_adapters_are_pushed_beside_each_other(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        for world in samplers:
            world.engine.go.clear()
        pushes = [
            asyncio.create_task(publisher.publish(name, snapshot(checkpoint, content)))
            for name, content in (("a", 1), ("b", 2), ("a", 3))
        ]
        await until(lambda: len(samplers[0].sampler.pushes._open) == 2)
        for world in samplers:
            world.engine.go.set()
        assert [(await push).version for push in pushes] == [1, 1, 2]
        assert samplers[0].live("a") == samplers[1].live("a") == {1: 1.0, 2: 3.0}


async def test_a_removed_adapter_is_not_looked_after(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        publisher.forget("a")
        await samplers[1].stop()
        await samplers[1].start()
        await until(samplers[1].sampler.current.is_set)
        assert samplers[1].live() == {}
        assert samplers[0].live() == {1: 1.0}
        with refused("ADAPTER_NOT_FOUND"):
            await publisher.publish("a", snapshot(checkpoint, 2))


async def test_a_removed_adapters_numbers_are_not_used_again(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        publisher.forget("a")
        for world in samplers:
            world.sampler.registry.unload("a", 0)
        publisher.manage("a")
        assert (await publisher.publish("a", snapshot(checkpoint, 2))).version == 2


async def answered_and_cut(stream):
    await ANSWERED(stream)
    raise UnavailableError("the connection broke")


async def never_sent(stream):
    raise UnavailableError("the connection broke")


async def unanswered(publisher, content, monkeypatch, commit=answered_and_cut) -> str:
    """Publishes while nobody answers COMMIT; the refusal's message."""
    with monkeypatch.context() as patch:
        patch.setattr(PushStream, "commit", commit)
        with refused("PUSH_FAILED") as refusal:
            await publisher.publish("a", content)
    return refusal.value.message


async def test_a_commit_without_an_answer_of_the_only_sampler_is_looked_after(samplers, checkpoint, monkeypatch):
    """The sampler lives on, and has the version that the trainer heard nothing of."""
    async with publishing(samplers[:1]) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        assert "may be live" in await unanswered(publisher, snapshot(checkpoint, 2), monkeypatch)
        await until(lambda: publisher.version("a") == 2)
        back = await publisher.publish("a", snapshot(checkpoint, 1))
        assert (back.version, states(back)) == (3, [ReplicaState.COMMITTED])
    assert samplers[0].live() == {2: 2.0, 3: 1.0}


async def test_an_only_sampler_that_fails_at_commit_keeps_its_version(samplers, checkpoint):
    async with publishing(samplers[:1]) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        samplers[0].engine.refusal = RuntimeError("out of memory")
        with refused("PUSH_FAILED"):
            await publisher.publish("a", snapshot(checkpoint, 2))
        assert publisher.version("a") == 1
    assert samplers[0].live() == {1: 1.0}


async def test_going_back_right_after_a_commit_without_an_answer_is_no_success_without_effect(
    samplers, checkpoint, monkeypatch
):
    monkeypatch.setattr(publisher_module, "_WATCH_SECONDS", 60)
    async with publishing(samplers[:1]) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        await unanswered(publisher, snapshot(checkpoint, 2), monkeypatch)
        assert (await publisher.publish("a", snapshot(checkpoint, 1))).version == 3
    assert max(samplers[0].live().items()) == (3, 1.0)


@pytest.mark.parametrize("commit", [answered_and_cut, never_sent])
async def test_a_version_whose_commit_nobody_answers_is_decided(samplers, checkpoint, monkeypatch, commit):
    async with publishing(samplers) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        assert "is decided" in await unanswered(publisher, snapshot(checkpoint, 2), monkeypatch, commit)
        assert publisher.version("a") == 2
        await until(lambda: [world.live() for world in samplers] == [{1: 1.0, 2: 2.0}] * 2)
        back = await publisher.publish("a", snapshot(checkpoint, 1))
        assert (back.version, states(back)) == (3, [ReplicaState.COMMITTED] * 2)
    assert [world.live() for world in samplers] == [{2: 2.0, 3: 1.0}] * 2


@pytest.mark.parametrize("missed", [1, 2])  # then the other one has the old version still, or no more
async def test_going_back_while_a_sampler_is_behind_is_no_success_without_effect(
    samplers, checkpoint, monkeypatch, missed
):
    begin, begun = PushStream.begin, []

    async def noted(stream, frame):
        stream.first = not begun
        begun.append(stream)
        return await begin(stream, frame)

    async def first_only(stream):
        if stream.first:
            return await ANSWERED(stream)
        raise UnavailableError("the connection broke")

    async with publishing(samplers) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        monkeypatch.setattr(publisher_module, "_WATCH_SECONDS", 60)
        await asyncio.sleep(0.2)
        for content in range(2, 2 + missed):
            begun.clear()
            with monkeypatch.context() as patch:
                patch.setattr(PushStream, "begin", noted)
                patch.setattr(PushStream, "commit", first_only)
                published = await publisher.publish("a", snapshot(checkpoint, content))
            assert sorted(states(published), key=str) == [ReplicaState.COMMITTED, ReplicaState.DOWN]
        with refused("PUSH_FAILED") as refusal:
            await publisher.publish("a", snapshot(checkpoint, 1))
        assert "have a later one" in refusal.value.message
    assert sorted(max(world.live()) for world in samplers) == [1, 1 + missed]


async def test_going_back_succeeds_after_a_sampler_has_lost_the_latest_version(samplers, checkpoint):
    async with publishing(samplers) as publisher:
        for content in (1, 2):
            await publisher.publish("a", snapshot(checkpoint, content))
        await until(lambda: all(world.sampler.current.is_set() for world in samplers))
        samplers[0].sampler.registry.unload("a", 2)
        with refused("PUSH_FAILED"):
            await publisher.publish("a", snapshot(checkpoint, 1))
        await until(lambda: samplers[0].live() == {1: 1.0, 2: 2.0})
        back = await publisher.publish("a", snapshot(checkpoint, 1))
        assert (back.version, states(back)) == (3, [ReplicaState.COMMITTED] * 2)


async def test_a_push_outlives_the_lookup_that_misses_its_sampler(samplers, checkpoint, monkeypatch):
    async with publishing(samplers[:1]) as publisher:
        addresses = Discovery.addresses
        samplers[0].engine.go.clear()
        pushing = asyncio.create_task(publisher.publish("a", snapshot(checkpoint, 1)))
        await samplers[0].engine.installing.wait()
        monkeypatch.setattr(Discovery, "addresses", _nobody)
        await until(lambda: not publisher.addresses)
        samplers[0].engine.go.set()
        assert states(await pushing) == [ReplicaState.COMMITTED]
        monkeypatch.setattr(Discovery, "addresses", addresses)
        await until(lambda: publisher.addresses)
        assert (await publisher.publish("a", snapshot(checkpoint, 1))).version == 1


async def test_the_watch_outlives_what_it_does_not_expect(samplers, checkpoint, monkeypatch):
    async with publishing(samplers[:1]) as publisher:
        await publisher.publish("a", snapshot(checkpoint, 1))
        failed = asyncio.Event()

        async def fails(discovery):
            failed.set()
            raise RuntimeError("unexpected")

        with monkeypatch.context() as patch:
            patch.setattr(Discovery, "addresses", fails)
            await failed.wait()
        await samplers[0].stop()
        await samplers[0].start()
        await until(samplers[0].sampler.current.is_set)
        assert samplers[0].live() == {1: 1.0}


@pytest.mark.parametrize(
    ("failure", "found"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "try again"), ["127.0.0.1:5"]),
        (OSError(errno.EMFILE, "too many open files"), ["127.0.0.1:5"]),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), []),
    ],
)
async def test_a_lookup_that_fails_for_the_moment_loses_nobody(monkeypatch, failure, found):
    discovery = Discovery(["dns:127.0.0.1:5"])
    assert await discovery.addresses() == ["127.0.0.1:5"]

    async def fails(*_, **__):
        raise failure

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fails)
    assert await discovery.addresses() == found


async def test_samplers_are_found_by_name_and_bad_targets_refused():
    found = await Discovery(["dns:localhost:50052", "sampler-0.example:1", "dns:no-such-host.invalid:5"]).addresses()
    assert "sampler-0.example:1" in found
    assert "127.0.0.1:50052" in found or "[::1]:50052" in found
    assert not any("invalid" in address for address in found)
    for target in ("localhost", "dns:localhost", ":50052", "host:port"):
        with refused("SAMPLER_ADDRESS_INVALID"):
            Discovery([target])


async def _nobody(discovery):
    return []


async def _no_reserve(adapter_id, version):
    pass
