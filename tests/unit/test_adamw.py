"""AdamW over an arena, against PyTorch's own optimizer in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from service_common.errors import ServiceError
from trainer_service import adamw
from trainer_service.adamw import AdamParams


def flat_arena(size: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        weights=torch.randn(size, generator=generator),
        gradients=torch.zeros(size),
        exp_avg=torch.zeros(size),
        exp_avg_sq=torch.zeros(size),
    )


def test_twenty_steps_equal_float64_within_1e_5() -> None:
    arena = flat_arena(257)
    reference = torch.nn.Parameter(arena.weights.double())
    optimizer = torch.optim.AdamW([reference], lr=3e-3, betas=(0.8, 0.9), eps=1e-10, weight_decay=0.05)
    params = AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.9, eps=1e-10, weight_decay=0.05, grad_clip_norm=10.0)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, 21):
        gradient = torch.randn(257, generator=generator) * number / 10  # clipped from about the sixth step on
        arena.gradients.copy_(gradient)
        adamw.step(arena, params, number, gradient.norm().item())
        reference.grad = gradient.double()
        torch.nn.utils.clip_grad_norm_([reference], 10.0)
        optimizer.step()
    assert torch.allclose(arena.weights.double(), reference, rtol=1e-5, atol=1e-6)


def test_what_is_clipped_is_the_norm_over_all_ranks() -> None:
    arena, other = flat_arena(8), flat_arena(8)
    for each, gradient in ((arena, torch.full((8,), 3.0)), (other, torch.full((8,), 0.3))):
        each.gradients.copy_(gradient)
    params = AdamParams(grad_clip_norm=1.0)
    adamw.step(arena, params, 1, norm=10.0)  # this rank has a part of it
    adamw.step(other, params, 1, norm=0.9)
    assert torch.allclose(arena.exp_avg, other.exp_avg)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", math.nan),
        ("learning_rate", -1e-4),
        ("beta1", 1.0),
        ("beta2", 1.5),
        ("eps", 0.0),
        ("weight_decay", math.inf),
        ("grad_clip_norm", -1.0),
    ],
)
def test_bad_hyper_parameters_are_named(name: str, value: float) -> None:
    with pytest.raises(ServiceError, match=name) as refusal:
        AdamParams(**{name: value})
    assert refusal.value.field == f"adam.{name}"
