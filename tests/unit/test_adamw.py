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
        norm = adamw.step(arena, params, number)
        reference.grad = gradient.double()
        expected_norm = torch.nn.utils.clip_grad_norm_([reference], 10.0)
        optimizer.step()
        assert norm == pytest.approx(expected_norm.item(), rel=1e-5)
    assert torch.allclose(arena.weights.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    arena = flat_arena(8)
    arena.gradients[3] = value
    before = arena.weights.clone()
    assert not math.isfinite(adamw.step(arena, AdamParams(), 1))
    assert torch.equal(arena.weights, before)
    assert not arena.exp_avg.any()
    assert not arena.exp_avg_sq.any()


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
