"""Which adapters are on the device, and that the way there and back changes nothing."""

import pytest
import torch

from service_common import lora
from tinkerbell.v1 import common_pb2
from trainer_service.lora.arena import Arena, Shard
from trainer_service.residency import Residency

CONFIG = lora.normalized(common_pb2.LoraConfig(rank=2, target_modules=["o_proj"]), 64)
PATH = lora.module_path(0, "o_proj")
SHAPES = {lora.peft_name(PATH, "A"): (2, 6), lora.peft_name(PATH, "B"): (5, 2)}


def arena(seed: int = 0) -> Arena:
    made = Arena(CONFIG, SHAPES.items(), Shard(range(1)), seed, torch.device("cpu"))
    for number, buffer in enumerate((made.gradients, made.exp_avg, made.exp_avg_sq)):
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(10 * seed + number)))
    return made


def filled(count: int, limit: int) -> tuple[Residency, list[Arena]]:
    residency, arenas = Residency(limit), []
    for seed in range(count):
        residency.make_room()
        arenas.append(arena(seed))
        residency.add(arenas[-1])
    return residency, arenas


def on_device(arenas: list[Arena]) -> list[int]:
    return [index for index, each in enumerate(arenas) if each.resident]


def test_buffers_come_back_bit_for_bit_to_where_their_views_point() -> None:
    moved = arena()
    buffers = (moved.weights, moved.gradients, moved.exp_avg, moved.exp_avg_sq)
    before = [buffer.clone() for buffer in buffers]
    name = next(iter(SHAPES))
    view = moved.view(moved.exp_avg, name)
    factor = moved.linears[0, "linear_proj"].a
    moved.spill()
    assert not moved.resident
    assert all(buffer.untyped_storage().nbytes() == 0 for buffer in buffers)
    moved.restore()
    assert moved.resident
    assert all(torch.equal(buffer, copy) for buffer, copy in zip(buffers, before, strict=True))
    moved.exp_avg.fill_(7)
    assert torch.equal(view, torch.full((2, 6), 7.0))
    factor.gradient.fill_(8)
    assert torch.equal(moved.view(moved.gradients, name), torch.full((2, 6), 8.0))


def test_the_least_recently_used_goes_first() -> None:
    residency, arenas = filled(3, limit=3)
    residency.use([arenas[0]])
    residency.make_room()
    assert on_device(arenas) == [0, 2]
    residency.use([arenas[1]])
    assert on_device(arenas) == [0, 1, 2]
    residency.use([arenas[2]])
    residency.make_room()
    assert on_device(arenas) == [1, 2]


def test_new_adapters_push_old_ones_out() -> None:
    _, arenas = filled(5, limit=2)
    assert on_device(arenas) == [3, 4]


def test_a_pass_of_more_adapters_than_the_limit_gets_them_all_and_the_surplus_goes_next_time() -> None:
    residency, arenas = filled(4, limit=2)
    residency.use(arenas[:3])
    assert set(on_device(arenas)) >= {0, 1, 2}
    residency.use([arenas[3]])
    assert len(on_device(arenas)) <= 2
    assert 3 in on_device(arenas)


def test_an_adapter_of_the_pass_does_not_push_another_one_out() -> None:
    residency, arenas = filled(3, limit=2)
    assert on_device(arenas) == [1, 2]
    residency.use([arenas[0], arenas[1]])  # 1 is the least recently used, but is needed
    assert on_device(arenas) == [0, 1]


@pytest.mark.parametrize("spilled", [False, True])
def test_a_removed_adapter_leaves_its_place(spilled: bool) -> None:
    residency, arenas = filled(2, limit=2)
    if spilled:
        residency.make_room()
    residency.remove(arenas[0])
    newcomer = arena(9)
    residency.make_room()
    residency.add(newcomer)
    assert arenas[1].resident
    assert newcomer.resident


def test_a_spill_for_which_there_is_no_memory_changes_nothing(monkeypatch) -> None:
    residency, arenas = filled(1, limit=1)
    before, empty, made = arenas[0].exp_avg.clone(), torch.empty, []

    def third_fails(*args, **options) -> torch.Tensor:
        made.append(args)
        if len(made) == 3:
            raise RuntimeError("out of memory")
        return empty(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", third_fails)
        with pytest.raises(RuntimeError):
            residency.make_room()
    assert on_device(arenas) == [0]
    assert torch.equal(arenas[0].exp_avg, before)
    residency.make_room()
    assert on_device(arenas) == []
    residency.use(arenas)
    assert torch.equal(arenas[0].exp_avg, before)


@pytest.mark.parametrize("spilled", [False, True])
def test_gradients_go_back_to_what_they_were_wherever_they_are(spilled: bool) -> None:
    moved = arena()
    before = moved.gradients.clone()
    for copy in (before, None):
        moved.gradients.fill_(7)
        if spilled:
            moved.spill()
        moved.reset_gradients(copy)
        if spilled:
            moved.restore()
        assert torch.equal(moved.gradients, torch.zeros_like(before) if copy is None else before)
