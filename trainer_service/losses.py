"""Losses over per-token log-probabilities, each a sum over tokens, so that gradients of requests add up.

Definitions as in https://tinker-docs.thinkingmachines.ai/losses (pages cross_entropy, importance_sampling, ppo, cispo,
dro and forward_backward_custom); trainer.proto repeats them at LossFunction. Below, lp is the log-probability of a
target now, q the one it was sampled with, ratio = exp(lp - q).
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from service_common import errors


class Loss(enum.Enum):
    """The losses by name."""

    CROSS_ENTROPY = "cross_entropy"
    IMPORTANCE_SAMPLING = "importance_sampling"
    PPO = "ppo"
    CISPO = "cispo"
    DRO = "dro"
    CUSTOM = "custom"


INPUTS: dict[Loss, tuple[str, ...]] = {
    Loss.CROSS_ENTROPY: ("weights",),
    Loss.IMPORTANCE_SAMPLING: ("logprobs", "advantages"),
    Loss.PPO: ("logprobs", "advantages"),
    Loss.CISPO: ("logprobs", "advantages"),
    Loss.DRO: ("logprobs", "advantages"),
    Loss.CUSTOM: ("logprob_gradients",),
}
"""The float32 arrays that a loss takes beside target_tokens."""

INPUT_DEFAULTS: dict[str, float] = {"weights": 1.0}
"""The arrays that may be absent, and what every position then has. All others are required."""


@dataclass(frozen=True)
class LossConfig:
    """Numbers that a loss takes; INVALID_ARGUMENT (LOSS_CONFIG_OUT_OF_RANGE) when one is out of range.

    Tinker's tutorial 202 names the clip thresholds' defaults, which `DEFAULTS` has for cispo; for beta its page on dro
    has 0.05 as the example and names no default.
    """

    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2
    beta: float = 0.05

    def __post_init__(self) -> None:
        self._check("clip_low_threshold", 0.0)
        self._check("clip_high_threshold", self.clip_low_threshold)
        self._check("beta", 0.0)

    def _check(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and value >= least):
            raise errors.invalid_argument(
                "LOSS_CONFIG_OUT_OF_RANGE",
                f"{name} is {value:g}; it must be finite and at least {least:g}",
                field=f"loss_config.{name}",
                value=value,
            )


DEFAULTS: dict[Loss, LossConfig] = {Loss.CISPO: LossConfig(clip_low_threshold=0.0, clip_high_threshold=4.0)}
"""The losses whose defaults are not LossConfig's own."""


@dataclass(frozen=True)
class LossResult:
    """The loss of one request, or of a part of one.

    `total`: float64 scalar to differentiate; NaN or infinite when a term is. `sums`: float64 scalars without gradient,
    under the same names for all parts of a request; add them up over its parts and give them to `metrics`.
    """

    total: Tensor
    sums: dict[str, Tensor]


def evaluate(loss: Loss, config: LossConfig, logprobs: Tensor, inputs: Mapping[str, Tensor]) -> LossResult:
    """The loss of `logprobs` under the arrays that `INPUTS` names, all of them float32 [T]; T may be 0.

    Sums are taken in float64, so that a request's loss hardly depends on how it was cut into parts.
    """
    match loss:
        case Loss.CROSS_ENTROPY:
            terms, sums = -inputs["weights"] * logprobs, {"weights": inputs["weights"]}
        case Loss.IMPORTANCE_SAMPLING:
            terms, sums = _importance_sampling(logprobs, inputs["logprobs"], inputs["advantages"])
        case Loss.PPO:
            terms, sums = _ppo(config, logprobs, inputs["logprobs"], inputs["advantages"])
        case Loss.CISPO:
            terms, sums = _cispo(config, logprobs, inputs["logprobs"], inputs["advantages"])
        case Loss.DRO:
            difference = logprobs - inputs["logprobs"]
            terms, sums = -(logprobs * inputs["advantages"] - config.beta / 2 * difference**2), {}
        case Loss.CUSTOM:
            terms, sums = inputs["logprob_gradients"] * logprobs, {}
    sums = {"loss": terms, "tokens": torch.ones_like(logprobs), **sums}
    return LossResult(
        terms.sum(dtype=torch.float64),
        {name: values.detach().sum(dtype=torch.float64) for name, values in sums.items()},
    )


def metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """ForwardResponse.metrics of a whole request from the sums over its parts. A mean over nothing is left out."""
    result = {"loss:sum": sums["loss"], "tokens:sum": sums["tokens"]}
    if "weights" in sums:
        result["weights:sum"] = sums["weights"]
        if sums["weights"]:
            result["loss:mean"] = sums["loss"] / sums["weights"]
    if sums.get("active"):
        result |= {f"{name}:mean": sums[name] / sums["active"] for name in ("ratio", "clipped") if name in sums}
    return result


type _Terms = tuple[Tensor, dict[str, Tensor]]


def _log_ratio(logprobs: Tensor, q: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """lp - q, and which positions have an advantage.

    Elsewhere 0: callers fill q with anything there, and a ratio that overflows would make 0 * inf = NaN.
    """
    active = advantages != 0
    return torch.where(active, logprobs - q, 0.0), active


def _importance_sampling(logprobs: Tensor, q: Tensor, advantages: Tensor) -> _Terms:
    log_ratio, active = _log_ratio(logprobs, q, advantages)
    ratio = log_ratio.exp()
    return -ratio * advantages, {"active": active, "ratio": ratio * active}


def _ppo(config: LossConfig, logprobs: Tensor, q: Tensor, advantages: Tensor) -> _Terms:
    """The minimum takes the clipped product where the ratio left the interval on the side that the advantage favours.

    Written by cases, since the gradient of min(inf, finite) is NaN: such a position must have the gradient 0.
    """
    low, high = config.clip_low_threshold, config.clip_high_threshold
    log_ratio, active = _log_ratio(logprobs, q, advantages)
    ratio = log_ratio.detach().exp()
    clipped = torch.where(advantages > 0, ratio > high, ratio < low) & active
    free = torch.where(clipped, 0.0, log_ratio).exp()
    terms = -torch.where(clipped, ratio.clamp(low, high), free) * advantages
    return terms, {"active": active, "ratio": ratio * active, "clipped": clipped}


def _cispo(config: LossConfig, logprobs: Tensor, q: Tensor, advantages: Tensor) -> _Terms:
    low, high = config.clip_low_threshold, config.clip_high_threshold
    log_ratio, active = _log_ratio(logprobs, q, advantages)
    ratio = log_ratio.detach().exp()
    clipped = ((ratio < low) | (ratio > high)) & active
    terms = -ratio.clamp(low, high) * logprobs * advantages
    return terms, {"active": active, "ratio": ratio * active, "clipped": clipped}
