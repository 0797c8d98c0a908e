"""What adapters compute in a linear layer, by the loop and by the GPU's kernels, against autograd in float64.

Without a GPU the kernels run in Triton's interpreter. Tolerance: 1e-5 relative in float32; 1e-2 in bfloat16, to which
activations, factors and x A^T are rounded.
"""

import kernels
import pytest
import torch

from service_common import lora
from tinkerbell.v1 import common_pb2
from trainer_service.lora import products
from trainer_service.lora.arena import Arena, Shard
from trainer_service.lora.grouped import Grouped
from trainer_service.lora.products import Features, Layer, Products, Segment

CPU = torch.device("cpu")
NUM_LAYERS = 2
GROUPS, QUERIES, HEAD, HIDDEN, INNER = 2, 32, 16, 48, 80
QKV = QUERIES + 2 * HEAD
LAYERS = [
    layer
    for number in range(NUM_LAYERS)
    for layer in (
        Layer(
            (number, "linear_qkv"),
            HIDDEN,
            {
                "q_proj": Features(GROUPS, 0, QUERIES, QKV),
                "k_proj": Features(GROUPS, QUERIES, QUERIES + HEAD, QKV),
                "v_proj": Features(GROUPS, QUERIES + HEAD, QKV, QKV),
            },
        ),
        Layer(
            (number, "linear_fc1"),
            HIDDEN,
            {"gate_proj": Features(1, 0, INNER, 2 * INNER), "up_proj": Features(1, INNER, 2 * INNER, 2 * INNER)},
        ),
        Layer((number, "linear_fc2"), INNER, {"down_proj": Features(1, 0, HIDDEN, HIDDEN)}),
    )
]
SIZES = {"q_proj": (GROUPS * QUERIES, HIDDEN), "k_proj": (GROUPS * HEAD, HIDDEN), "v_proj": (GROUPS * HEAD, HIDDEN)} | {
    "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)
}  # fmt: skip
CONFIGS = {
    "all": common_pb2.LoraConfig(rank=4, alpha=6, target_modules=list(SIZES)),
    "one": common_pb2.LoraConfig(rank=1, alpha=3, target_modules=["q_proj", "down_proj"]),
    "patterned": common_pb2.LoraConfig(
        rank=3,
        rank_pattern={lora.module_path(1, "k_proj"): 20},
        alpha_pattern={lora.module_path(1, "v_proj"): 7.0},
        target_modules=["k_proj", "v_proj", "up_proj"],
    ),
    "wide": common_pb2.LoraConfig(rank=70, alpha=8, target_modules=["v_proj", "gate_proj"]),
}
# Tokens of each adapter in the pass; "" for none.
STRETCHES = [("all", 5), ("", 3), ("one", 70), ("patterned", 1), ("wide", 130), ("", 2)]
NUM_TOKENS = sum(length for _, length in STRETCHES)


def arena(config: common_pb2.LoraConfig, seed: int, device: torch.device = CPU) -> Arena:
    config = lora.normalized(config, 128)
    shapes = {}
    for number in range(NUM_LAYERS):
        for module in config.target_modules:
            path = lora.module_path(number, module)
            outputs, inputs = SIZES[module]
            shapes[lora.peft_name(path, "A")] = (lora.module_rank(config, path), inputs)
            shapes[lora.peft_name(path, "B")] = (outputs, lora.module_rank(config, path))
    made = Arena(config, shapes.items(), Shard(range(NUM_LAYERS)), seed, device)
    generator = torch.Generator().manual_seed(seed)
    made.weights.copy_(torch.empty(made.weights.shape).normal_(0, 0.2, generator=generator))
    made.gradients.copy_(torch.empty(made.weights.shape).normal_(0, 1, generator=generator))  # of calls before
    return made


def segments(device: torch.device = CPU) -> list[Segment]:
    return [Segment(arena(CONFIGS[name], 3, device) if name else None, length) for name, length in STRETCHES]


def activations(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x, y, and gradients of y and x."""
    outputs = sum(part.groups * (part.stop - part.start) for part in layer.modules.values())
    generator = torch.Generator().manual_seed(7)
    return tuple(
        torch.randn(NUM_TOKENS, 1, width, generator=generator).to(device, dtype)
        for width in (layer.num_inputs, outputs, outputs, layer.num_inputs)
    )


def device_of(parts: list[Segment]) -> torch.device:
    return next(part.arena.weights.device for part in parts if part.arena is not None)


def computed(layer: Layer, of: Products, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the gradient of x; adds to the arenas."""
    x, y, grad_y, grad_x = activations(layer, dtype, device)
    low = of.down(x)
    return y + of.up(low), grad_x + of.up_gradient(of.down_gradient(grad_y, low), x)


def reference(layer: Layer, parts: list[Segment]) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]:
    """The same by autograd, from PEFT's definition, in float64; and the gradient of each segment's tensors."""
    x, y, grad_y, grad_x = (tensor.double() for tensor in activations(layer, torch.float32, device_of(parts)))
    x.requires_grad_()
    outputs, leaves = [], []
    start = 0
    for segment in parts:
        rows = slice(start, start + segment.num_tokens)
        start = rows.stop
        output, mine = y[rows, 0].clone(), {}
        for module, features in layer.modules.items():
            path = lora.module_path(layer.key[0], module)
            names = [lora.peft_name(path, half) for half in "AB"]
            if segment.arena is None or names[0] not in segment.arena.names:
                continue
            a, b = (segment.arena.view(segment.arena.weights, name).double().requires_grad_() for name in names)
            adapter = segment.arena.linears[layer.key]
            scale = adapter.scales[list(adapter.b).index(module)]
            columns = [
                group * features.width + column
                for group in range(features.groups)
                for column in range(features.start, features.stop)
            ]
            output = output.index_add(1, torch.tensor(columns, device=x.device), scale * x[rows, 0] @ a.T @ b.T)
            mine |= dict(zip(names, (a, b), strict=True))
        outputs.append(output)
        leaves.append(mine)
    result = torch.cat(outputs)[:, None]
    result.backward(grad_y)
    assert x.grad is not None
    gradients = [{name: leaf.grad for name, leaf in mine.items()} for mine in leaves]
    return result.detach(), grad_x + x.grad, gradients


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def check(layer: Layer, parts: list[Segment], of: Products, dtype: torch.dtype, tolerance: float) -> None:
    before = [None if part.arena is None else part.arena.gradients.double() for part in parts]
    y, grad_x, gradients = reference(layer, parts)
    ours = computed(layer, of, dtype, device_of(parts))
    assert_close(ours[0], y, tolerance)
    assert_close(ours[1], grad_x, tolerance)
    for part, old, mine in zip(parts, before, gradients, strict=True):
        if part.arena is None:
            continue
        changed = part.arena.gradients.double() - old
        for name in part.arena.names:
            if name in mine:
                assert_close(part.arena.view(changed, name), mine[name], tolerance)
            else:
                assert not part.arena.view(changed, name).any(), name


by_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.key[1]}{layer.key[0]}")


@by_layer
def test_the_loop_equals_autograd_in_float64(layer: Layer) -> None:
    parts = segments()
    of = products.looped(parts)(layer)
    assert of is not None
    check(layer, parts, of, torch.float32, 1e-5)


@by_layer
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5),
        pytest.param(torch.bfloat16, 1e-2, marks=kernels.compiled_only),
    ],  # interpreted: no bfloat16
)
def test_the_kernels_equal_autograd_in_float64(layer: Layer, dtype: torch.dtype, tolerance: float) -> None:
    parts = segments(kernels.DEVICE)
    of = Grouped(LAYERS, kernels.DEVICE).batch(parts)(layer)
    assert of is not None
    check(layer, parts, of, dtype, tolerance)


def test_an_adapter_that_leaves_a_layer_alone_has_no_products_with_it() -> None:
    alone = [Segment(arena(CONFIGS["one"], seed=1), NUM_TOKENS)]
    batch = products.looped(alone)
    assert [batch(layer) is not None for layer in LAYERS[:3]] == [True, False, True]
    assert Grouped(LAYERS, torch.device("cpu")).batch([Segment(None, 4)])(LAYERS[0]) is None
