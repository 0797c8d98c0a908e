"""An adapter's memory on one rank, and that the parts of all ranks make up the whole."""

import numpy as np
import pytest
import torch

from service_common import lora
from tinkerbell.v1 import common_pb2
from trainer_service.lora.arena import Arena, Shard

LAYERS = 4
WIDTHS = {"q_proj": (16, 8), "k_proj": (8, 8), "v_proj": (8, 8), "o_proj": (8, 16)} | {
    "gate_proj": (32, 8), "up_proj": (32, 8), "down_proj": (8, 32)
}  # fmt: skip
PATTERNED = lora.normalized(
    common_pb2.LoraConfig(
        rank=2,
        rank_pattern={lora.module_path(1, "k_proj"): 5, lora.module_path(2, "down_proj"): 1},
        alpha_pattern={lora.module_path(1, "v_proj"): 3.0},
    ),
    64,
)
SOME_MODULES = lora.normalized(common_pb2.LoraConfig(rank=3, target_modules=["v_proj", "down_proj", "up_proj"]), 64)
both_configs = pytest.mark.parametrize("config", [PATTERNED, SOME_MODULES], ids=["patterned", "some modules"])
# (stages, ranks that share a layer)
layouts = pytest.mark.parametrize(("stages", "size"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 4)])


def shapes(config: common_pb2.LoraConfig) -> dict[str, tuple[int, int]]:
    result = {}
    for layer in range(LAYERS):
        for module in config.target_modules:
            path = lora.module_path(layer, module)
            rank = lora.module_rank(config, path)
            result[lora.peft_name(path, "A")] = (rank, WIDTHS[module][1])
            result[lora.peft_name(path, "B")] = (WIDTHS[module][0], rank)
    return result


def arena(config: common_pb2.LoraConfig, shard: Shard | None = None, seed: int = 5) -> Arena:
    return Arena(config, shapes(config).items(), shard or Shard(range(LAYERS)), seed, torch.device("cpu"))


def sharded(config: common_pb2.LoraConfig, stages: int, size: int) -> list[Arena]:
    depth = LAYERS // stages
    return [
        arena(config, Shard(range(stage * depth, (stage + 1) * depth), index, size))
        for stage in range(stages)
        for index in range(size)
    ]


def random_tensors(config: common_pb2.LoraConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes(config).items()}


@both_configs
@layouts
def test_the_shards_of_a_new_adapter_add_up_to_the_adapter(config, stages: int, size: int) -> None:
    alone = arena(config)
    total = sum(part.whole(part.weights) for part in sharded(config, stages, size))
    assert torch.equal(total, alone.whole(alone.weights))
    assert total.count_nonzero() == sum(np.prod(shape) for name, shape in shapes(config).items() if "lora_A" in name)


@both_configs
@layouts
def test_what_is_loaded_into_the_shards_is_what_they_add_up_to(config, stages: int, size: int) -> None:
    tensors = random_tensors(config)
    total = torch.zeros(sum(tensor.size for tensor in tensors.values()))
    for part in sharded(config, stages, size):
        part.load(part.exp_avg, tensors)
        total += part.whole(part.exp_avg)
        assert not part.exp_avg_sq.any()
    assert set(part.names) == set(tensors)
    assert np.array_equal(total.numpy(), np.concatenate([tensors[name].ravel() for name in part.names]))


@layouts
def test_own_parts_hold_every_element_once_and_copies_are_the_same_everywhere(stages: int, size: int) -> None:
    tensors = random_tensors(PATTERNED)
    parts = sharded(PATTERNED, stages, size)
    for part in parts:
        part.load(part.gradients, tensors)
    square = sum(part.own(part.gradients).double().square().sum().item() for part in parts)
    assert square == pytest.approx(sum(float((tensor.astype(np.float64) ** 2).sum()) for tensor in tensors.values()))
    for stage in range(stages):
        first, *others = parts[stage * size : (stage + 1) * size]
        for other in others:
            assert torch.equal(first.copies(first.gradients), other.copies(other.gradients))


def test_each_rank_holds_rows_of_b_or_columns_of_a_and_all_of_the_other() -> None:
    part = arena(PATTERNED, Shard(range(LAYERS), index=1, size=4))
    tensors = random_tensors(PATTERNED)
    part.load(part.weights, tensors)
    for module, by_input in (("up_proj", False), ("q_proj", False), ("o_proj", True), ("down_proj", True)):
        first, second = (lora.peft_name(lora.module_path(0, module), half) for half in "AB")
        a, b = (part.view(part.weights, name).numpy() for name in (first, second))
        if by_input:
            assert np.array_equal(a, np.split(tensors[first], 4, axis=1)[1])
            assert np.array_equal(b, tensors[second])
        else:
            assert np.array_equal(a, tensors[first])
            assert np.array_equal(b, np.split(tensors[second], 4, axis=0)[1])


def test_a_stage_has_nothing_of_the_layers_of_another() -> None:
    part = arena(PATTERNED, Shard(range(2, 4)))
    assert part.view(part.weights, lora.peft_name(lora.module_path(0, "q_proj"), "A")).numel() == 0
    assert {layer for layer, _ in part.linears} == {2, 3}
    assert part.num_parameters == arena(PATTERNED).num_parameters


def test_seed_and_name_decide_the_values() -> None:
    first, same, other = arena(PATTERNED), arena(PATTERNED), arena(PATTERNED, seed=6)
    assert torch.equal(first.weights, same.weights)
    name = lora.peft_name(lora.module_path(0, "v_proj"), "A")
    assert not torch.equal(first.view(first.weights, name), other.view(other.weights, name))
    # Another rank elsewhere and fewer modules change nothing.
    small = lora.normalized(common_pb2.LoraConfig(rank=2, target_modules=["v_proj"]), 64)
    alone = arena(small)
    assert torch.equal(first.view(first.weights, name), alone.view(alone.weights, name))
    assert first.view(first.weights, name).abs().max() <= 8**-0.5


def test_a_linear_has_the_ranks_and_scales_of_its_modules() -> None:
    made = arena(PATTERNED)
    linear = made.linears[1, "linear_qkv"]
    assert linear.ranks == [2, 5, 2]
    assert linear.a.weight.shape == (9, 8)
    assert [factor.weight.shape for factor in linear.b.values()] == [(16, 2), (8, 5), (8, 2)]
    assert linear.scales == [16.0, 32 / 5, 1.5]
    assert made.linears[0, "linear_qkv"].scales == [16.0] * 3
    linear.b["k_proj"].gradient.fill_(1)
    assert made.view(made.gradients, lora.peft_name(lora.module_path(1, "k_proj"), "B")).eq(1).all()
    assert made.gradients.count_nonzero() == 8 * 5


def test_rank_stabilised_scales_divide_by_the_root() -> None:
    config = lora.normalized(common_pb2.LoraConfig(rank=4, alpha=8, use_rslora=True, target_modules=["o_proj"]), 64)
    assert arena(config).linears[0, "linear_proj"].scales == [4.0]
