"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) over an adapter's flat buffers, with clipping by global norm."""

import math
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from service_common import errors
from trainer_service.lora.arena import Arena


@dataclass(frozen=True)
class AdamParams:
    """Hyper-parameters of one step. The defaults are Tinker's."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        """INVALID_ARGUMENT, naming the field, on a value that cannot be stepped with."""
        for name, value in vars(self).items():
            if not math.isfinite(value) or value < 0:
                raise _out_of_range(name, value, "finite and at least 0")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise _out_of_range(name, getattr(self, name), "in [0, 1)")
        if self.eps == 0:
            raise _out_of_range("eps", self.eps, "above 0")


def _out_of_range(name: str, value: float, allowed: str) -> errors.ServiceError:
    return errors.invalid_argument(
        "ADAM_PARAM_OUT_OF_RANGE", f"{name} is {value} and must be {allowed}", field=f"adam.{name}", value=value
    )


def step(arena: Arena, params: AdamParams, number: int, norm: float) -> None:
    """Applies the arena's gradient, whose L2 norm over all ranks is `norm`, as step `number` (from 1)."""
    if params.grad_clip_norm and norm > params.grad_clip_norm:
        arena.gradients.mul_(params.grad_clip_norm / norm)
    adamw(
        [arena.weights],
        [arena.gradients],
        [arena.exp_avg],
        [arena.exp_avg_sq],
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(float(number - 1), device=arena.weights.device)],
        fused=True,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )
