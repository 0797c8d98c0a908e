"""AdamW over an arena."""

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
    """Against Loshchilov and Hutter's algorithm 2 (arXiv:1711.05101), with the decay scaled by the learning rate."""
    arena = flat_arena(257)
    rate, beta1, beta2, eps, decay = 3e-3, 0.8, 0.9, 1e-10, 0.05
    params = AdamParams(rate, beta1, beta2, eps, weight_decay=decay, grad_clip_norm=10.0)
    weights = arena.weights.double()
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, 21):
        gradient = torch.randn(257, generator=generator) * number / 10  # clipped from about the sixth step on
        norm = gradient.norm().item()
        arena.gradients.copy_(gradient)
        adamw.step(arena, params, number, norm)
        clipped = gradient.double() * min(1.0, 10.0 / norm)
        first = beta1 * first + (1 - beta1) * clipped
        second = beta2 * second + (1 - beta2) * clipped**2
        direction = first / (1 - beta1**number) / ((second / (1 - beta2**number)).sqrt() + eps)
        weights = weights - rate * (direction + decay * weights)
    assert torch.allclose(arena.weights.double(), weights, rtol=1e-5, atol=1e-6)


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
