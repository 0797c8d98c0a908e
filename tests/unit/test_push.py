import asyncio
import contextlib
import json
import random
import threading
import typing
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sampler_service.push import AlreadyLive, Push, Pushes
from sampler_service.versions import Registry
from service_common.checkpoint import Checkpoint
from service_common.errors import Code, ServiceError
from service_common.lora import TARGET_MODULES, tensor_shapes
from tinkerbell import payload
from tinkerbell.v1 import common_pb2, sampler_pb2

HIDDEN, MIDDLE = 8, 12


def read(path: str) -> bytes:
    """As a worker does it."""
    return Path(path).read_bytes()


class FakeEngine:
    """Keeps what it was given; does not answer before `go` is set."""

    def __init__(self):
        self.installed = {}
        self.go = asyncio.Event()
        self.go.set()
        self.error = None

    async def install(self, version, memory_id):
        await self.go.wait()
        if self.error:
            raise self.error
        self.installed[version.version] = read(version.payload.path)
        last = version.manifest.tensors[-1]
        assert len(self.installed[version.version]) == last.offset + last.size_bytes

    def drop(self, version):
        del self.installed[version.version]
        version.payload.close()


class FakeLanes:
    """Has one part, with the id 1, at port 7, and gives it away when `go` is set."""

    def __init__(self):
        self.part = b""
        self.go = threading.Event()
        self.go.set()

    def read(self, part, target):
        self.go.wait()
        if (part.lane_port, part.part_id) != (7, 1):
            raise payload.PayloadError("no such part")
        target[:] = self.part


class World:
    """A registry with pushes into a fake engine."""

    all: typing.ClassVar[list["World"]] = []

    def __init__(self, checkpoint):
        World.all.append(self)
        self.engine = FakeEngine()
        self.registry = Registry(2, self.engine.drop)
        self.pushes = Pushes(checkpoint, 4, self.registry, self.engine.install, self.engine.drop, FakeLanes())

    async def push(self, version, manifest, chunks):
        """The version that is live afterwards."""
        push = self.pushes.begin("a", version, manifest)
        if isinstance(push, AlreadyLive):
            return push
        with contextlib.closing(push):
            for chunk in chunks:
                push.add(chunk)
            return await push.commit()


def end_worlds():
    """Unloads the live versions, with which the last payload must go."""
    while World.all:
        world = World.all.pop()
        for adapter_id in world.registry.adapters():
            world.registry.unload(adapter_id, 0)
        assert world.pushes.staging.used_bytes == 0


@pytest.fixture(autouse=True)
def ended_worlds():
    yield
    end_worlds()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"gate_proj": (MIDDLE, HIDDEN), "up_proj": (MIDDLE, HIDDEN), "down_proj": (HIDDEN, MIDDLE)}
    weights = {}
    for module in TARGET_MODULES:
        block = "mlp" if module in shapes else "self_attn"
        shape = shapes.get(module, (HIDDEN, HIDDEN))
        weights[f"model.layers.0.{block}.{module}.weight"] = torch.zeros(shape)
    save_file(weights, folder / "model.safetensors")
    return Checkpoint("model", folder)


def adapter(checkpoint: Checkpoint, seed: int) -> tuple[common_pb2.AdapterManifest, bytes]:
    lora = common_pb2.LoraConfig(rank=2, alpha=4, target_modules=TARGET_MODULES)
    shapes = tensor_shapes(checkpoint, common_pb2.LoraConfig(rank=2, alpha=1.0, target_modules=TARGET_MODULES))
    manifest = payload.build_manifest(lora, shapes, common_pb2.DATA_TYPE_BFLOAT16, checkpoint.fingerprint)
    data = random.Random(seed).randbytes(manifest.size_bytes)
    manifest.digest = payload.digest(manifest, data)
    return manifest, data


def small_chunks(data: bytes, size: int = 100) -> list[common_pb2.PayloadChunk]:
    chunks = []
    for offset in range(0, len(data), size):
        (chunk,) = payload.chunks(data[offset : offset + size])
        chunk.offset = offset
        chunks.append(chunk)
    return chunks


def staged_bytes() -> int:
    """In use by the worlds of this test."""
    return sum(world.pushes.staging.used_bytes for world in World.all)


async def test_a_committed_push_is_live_and_the_engine_had_its_bytes(checkpoint):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    live = await world.push(1, manifest, small_chunks(data))
    assert world.registry.latest("a") is live
    assert (live.version, live.digest) == (1, manifest.digest)
    assert world.engine.installed == {1: data}
    assert bytes(live.payload.view) == data
    end_worlds()
    assert world.engine.installed == {}
    assert staged_bytes() == 0


async def check_only_a_commit_makes_it_live(world: World, installed: Callable[[], Awaitable[Push]]) -> None:
    """`installed`: begins a push of version 1, and returns when the engine has it."""
    for commits in (False, True):
        with contextlib.closing(await installed()) as push:
            assert world.registry.adapters() == {}
            if commits:
                await push.commit()
        assert (world.registry.latest("a") is not None) == commits
        assert bool(world.engine.installed) == commits
        assert bool(staged_bytes()) == commits


async def test_a_prepared_push_is_in_the_engine_and_only_its_commit_makes_it_live(checkpoint):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)

    async def installed():
        push = world.pushes.begin("a", 1, manifest)
        for chunk in small_chunks(data):
            push.add(chunk)
        assert (await push.prepare()).digest == manifest.digest
        assert world.engine.installed == {1: data}
        return push

    await check_only_a_commit_makes_it_live(world, installed)


async def test_a_prepare_that_outlives_its_caller_leaves_nothing(checkpoint):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    world.engine.go.clear()
    push = world.pushes.begin("a", 1, manifest)
    for chunk in small_chunks(data):
        push.add(chunk)
    caller = asyncio.create_task(push.prepare())
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    push.close()
    world.engine.go.set()
    await asyncio.sleep(0.01)
    assert world.engine.installed == {}
    assert world.registry.adapters() == {}
    assert staged_bytes() == 0
    assert (await world.push(1, manifest, small_chunks(data))).version == 1


async def test_a_payload_in_gpu_memory_is_installed_ahead_and_only_its_commit_makes_it_live(checkpoint):
    world = World(checkpoint)

    async def installed():
        push = world.pushes.begin("a", 1, adapter(checkpoint, 1)[0], "memory")
        await asyncio.sleep(0.01)
        assert list(world.engine.installed) == [1]
        return push

    await check_only_a_commit_makes_it_live(world, installed)


async def test_an_installation_ahead_that_fails_is_heard_of_by_whoever_asks(checkpoint):
    world = World(checkpoint)
    world.engine.error = RuntimeError("no")
    with contextlib.closing(world.pushes.begin("a", 1, adapter(checkpoint, 1)[0], "memory")) as push:
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="no"):
            await push.prepare()
    assert staged_bytes() == 0
    world.pushes.begin("a", 1, adapter(checkpoint, 1)[0]).close()


async def test_the_same_digest_again_moves_nothing(checkpoint):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    live = await world.push(3, manifest, small_chunks(data))
    for number in (3, 4, 2):
        assert await world.push(number, manifest, []) == AlreadyLive(live)


async def test_a_version_never_changes_and_never_goes_back(checkpoint):
    world = World(checkpoint)
    await world.push(3, adapter(checkpoint, 1)[0], small_chunks(adapter(checkpoint, 1)[1]))
    for number in (1, 3):
        with pytest.raises(ServiceError) as refused:
            world.pushes.begin("a", number, adapter(checkpoint, 2)[0])
        assert (refused.value.code, refused.value.reason) == (Code.ALREADY_EXISTS, "VERSION_EXISTS")
        assert refused.value.metadata["latest_version"] == "3"


async def test_one_push_at_a_time_per_adapter(checkpoint):
    world = World(checkpoint)
    manifest, _ = adapter(checkpoint, 1)
    with contextlib.closing(world.pushes.begin("a", 1, manifest)):
        with pytest.raises(ServiceError) as refused:
            world.pushes.begin("a", 1, manifest)
        assert (refused.value.code, refused.value.reason) == (Code.ABORTED, "PUSH_IN_PROGRESS")
        world.pushes.begin("b", 1, manifest).close()
    world.pushes.begin("a", 1, manifest).close()


async def test_a_push_without_commit_leaves_nothing(checkpoint):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    with contextlib.closing(world.pushes.begin("a", 1, manifest)) as push:
        for chunk in small_chunks(data):
            push.add(chunk)
        assert staged_bytes() == len(data)
    assert world.registry.adapters() == {}
    assert staged_bytes() == 0


def part(offset: int, size: int, part_id: int = 1) -> sampler_pb2.PushPart:
    return sampler_pb2.PushPart(offset=offset, size_bytes=size, lane_port=7, part_id=part_id)


async def test_a_part_of_a_payload_may_come_from_a_lane(checkpoint):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    world.pushes.lanes.part = data[100:300]
    chunks = small_chunks(data)
    with contextlib.closing(world.pushes.begin("a", 1, manifest)) as push:
        push.add(chunks[0])
        push.add_part(part(100, 200))
        for chunk in chunks[3:]:
            push.add(chunk)
        await push.commit()
    assert world.engine.installed == {1: data}


@pytest.mark.parametrize("lost", ["id", "bytes", "order", "size"])
async def test_a_part_that_is_not_what_was_announced_installs_nothing(checkpoint, lost):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    world.pushes.lanes.part = data if lost != "bytes" else data[:-1] + b"?"
    named = part(int(lost == "order"), len(data) + (lost == "size"), 2 if lost == "id" else 1)
    with contextlib.closing(world.pushes.begin("a", 1, manifest)) as push, pytest.raises(ServiceError) as refused:
        push.add_part(named)
        await push.commit()
    assert (refused.value.code, refused.value.reason) == (Code.DATA_LOSS, "PAYLOAD_DAMAGED")
    assert world.engine.installed == {}
    assert staged_bytes() == 0
    assert (await world.push(1, manifest, small_chunks(data))).version == 1


@pytest.mark.parametrize("fails", [False, True])
async def test_memory_is_not_free_before_its_parts_have_been_read(checkpoint, fails):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    world.pushes.lanes.part = data
    world.pushes.lanes.go.clear()
    push = world.pushes.begin("a", 1, manifest)
    push.add_part(part(0, len(data), 2 if fails else 1))
    push.close()
    await asyncio.sleep(0.05)
    assert staged_bytes() == len(data)
    with pytest.raises(ServiceError, match="another push"):
        world.pushes.begin("a", 1, manifest)
    world.pushes.lanes.go.set()
    async with asyncio.timeout(5):
        while staged_bytes():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await world.push(1, manifest, small_chunks(data))).version == 1


async def test_an_install_that_fails_leaves_nothing_and_the_next_push_succeeds(checkpoint):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    world.engine.error = RuntimeError("rank 1 is out of memory")
    with pytest.raises(RuntimeError, match="rank 1"):
        await world.push(1, manifest, small_chunks(data))
    assert world.registry.adapters() == {}
    world.engine.error = None
    assert (await world.push(1, manifest, small_chunks(data))).version == 1


async def test_a_commit_runs_to_its_end_when_the_caller_is_cancelled(checkpoint):
    world = World(checkpoint)
    manifest, data = adapter(checkpoint, 1)
    world.engine.go.clear()
    caller = asyncio.create_task(world.push(1, manifest, small_chunks(data)))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert world.registry.latest("a") is None
    with pytest.raises(ServiceError) as refused:  # the install still reads the staged bytes
        world.pushes.begin("a", 2, adapter(checkpoint, 2)[0])
    assert refused.value.reason == "PUSH_IN_PROGRESS"
    world.engine.go.set()
    await asyncio.sleep(0.01)
    assert world.registry.latest("a").version == 1
    manifest, data = adapter(checkpoint, 2)
    assert (await world.push(2, manifest, small_chunks(data))).version == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "base_model_fingerprint", "0" * 64), "BASE_MODEL_MISMATCH"),
        (lambda m: setattr(m.lora, "rank", 5), "RANK_OUT_OF_RANGE"),
        (lambda m: setattr(m.lora, "alpha", float("nan")), "ALPHA_OUT_OF_RANGE"),
        (lambda m: setattr(m, "size_bytes", m.size_bytes * 1000), "MANIFEST_INVALID"),
        (lambda m: m.tensors.pop(), "MANIFEST_INVALID"),
        (lambda m: setattr(m.tensors[0], "name", "base_model.model.lm_head.lora_A.weight"), "TENSOR_UNEXPECTED"),
    ],
)
async def test_a_manifest_that_the_base_model_cannot_carry_is_refused(checkpoint, change, reason):
    world = World(checkpoint)
    manifest, _ = adapter(checkpoint, 1)
    change(manifest)
    with pytest.raises(ServiceError) as refused:
        world.pushes.begin("a", 1, manifest)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("adapter_id", "version", "reason"), [("a/b", 1, "ADAPTER_ID_INVALID"), ("a", 0, "VERSION_INVALID")]
)
async def test_bad_names_are_refused(checkpoint, adapter_id, version, reason):
    with pytest.raises(ServiceError) as refused:
        World(checkpoint).pushes.begin(adapter_id, version, adapter(checkpoint, 1)[0])
    assert refused.value.reason == reason


def flipped(chunks, at):
    data = bytearray(chunks[at].data)
    data[at % len(data)] ^= 1
    chunks[at].data = bytes(data)


DAMAGES = {
    "flipped": flipped,
    "dropped": lambda chunks, at: chunks.pop(at),
    "duplicated": lambda chunks, at: chunks.insert(at, chunks[at]),
    "reordered": lambda chunks, at: chunks.insert(at - 1 if at else 2, chunks.pop(at)),
    "truncated": lambda chunks, at: setattr(chunks[at], "data", chunks[at].data[:-1]),
    "too much": lambda chunks, at: chunks.append(chunks[at]),
}


@given(st.sampled_from(sorted(DAMAGES)), st.integers(0, 4))
def test_a_damaged_payload_never_installs_and_the_next_push_succeeds(checkpoint, damage, at):
    async def scenario():
        world = World(checkpoint)
        manifest, data = adapter(checkpoint, 1)
        chunks = small_chunks(data)
        DAMAGES[damage](chunks, at)
        with pytest.raises(ServiceError) as refused:
            await world.push(1, manifest, chunks)
        assert (refused.value.code, refused.value.reason) == (Code.DATA_LOSS, "PAYLOAD_DAMAGED")
        assert world.registry.adapters() == {}
        assert world.engine.installed == {}
        assert staged_bytes() == 0
        assert (await world.push(1, manifest, small_chunks(data))).digest == manifest.digest
        end_worlds()

    asyncio.run(scenario())
