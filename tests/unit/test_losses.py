"""Every loss against its formula, written again with numpy in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from service_common.errors import Code, ServiceError
from trainer_service.losses import INPUT_DEFAULTS, INPUTS, Loss, LossConfig, LossResult, evaluate, metrics

Arrays = dict[str, np.ndarray]
LOW, HIGH, BETA = 0.7, 1.5, 0.3
CONFIG = LossConfig(LOW, HIGH, BETA)


def importance_sampling(lp: np.ndarray, a: Arrays) -> np.ndarray:
    return -np.exp(lp - a["logprobs"]) * a["advantages"]


def ppo(lp: np.ndarray, a: Arrays) -> np.ndarray:
    ratio = np.exp(lp - a["logprobs"])
    return -np.minimum(ratio * a["advantages"], np.clip(ratio, LOW, HIGH) * a["advantages"])


def dro(lp: np.ndarray, a: Arrays) -> np.ndarray:
    return -(lp * a["advantages"] - BETA / 2 * (lp - a["logprobs"]) ** 2)


# cispo is absent: its clipped ratio is a constant for the derivative, which `coefficient` below provides for
FORMULAS: dict[Loss, Callable[[np.ndarray, Arrays], np.ndarray]] = {
    Loss.CROSS_ENTROPY: lambda lp, a: -a["weights"] * lp,
    Loss.IMPORTANCE_SAMPLING: importance_sampling,
    Loss.PPO: ppo,
    Loss.DRO: dro,
    Loss.CUSTOM: lambda lp, a: a["logprob_gradients"] * lp,
}


def formula(loss: Loss, logprobs: np.ndarray, arrays: Arrays) -> Callable[[np.ndarray], np.ndarray]:
    """The terms as a function of lp, at `logprobs`."""
    if loss is Loss.CISPO:
        coefficient = np.clip(np.exp(logprobs - arrays["logprobs"]), LOW, HIGH)
        return lambda lp: -coefficient * lp * arrays["advantages"]
    return lambda lp: FORMULAS[loss](lp, arrays)


def example(loss: Loss, length: int = 200, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(length, generator=generator)
    arrays = {name: torch.randn(length, generator=generator) for name in INPUTS[loss]}
    if "advantages" in arrays:
        arrays["logprobs"] = logprobs + 0.6 * arrays["logprobs"]  # ratios on both sides of the interval
        arrays["advantages"][::5] = 0.0
    return logprobs.requires_grad_(), arrays


def float64(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.items()}


def run(loss: Loss, config: LossConfig = CONFIG, **arrays: list[float]) -> tuple[LossResult, list[float]]:
    """Evaluates at `lp`; also the gradient."""
    tensors = {name: torch.tensor(values) for name, values in arrays.items()}
    logprobs = tensors.pop("lp").requires_grad_()
    result = evaluate(loss, config, logprobs, tensors)
    result.total.backward()
    return result, logprobs.grad.tolist()


def numbers(result: LossResult) -> dict[str, float]:
    return metrics({name: value.item() for name, value in result.sums.items()})


@pytest.mark.parametrize("loss", Loss)
def test_value_and_gradient_are_those_of_the_formula(loss: Loss) -> None:
    logprobs, arrays = example(loss)
    result = evaluate(loss, CONFIG, logprobs, arrays)
    result.total.backward()
    lp = logprobs.detach().numpy().astype(np.float64)
    terms = formula(loss, lp, float64(arrays))
    assert result.total.item() == pytest.approx(terms(lp).sum(), rel=1e-6)
    h = 1e-6
    np.testing.assert_allclose(logprobs.grad, (terms(lp + h) - terms(lp - h)) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", Loss)
def test_parts_of_a_request_add_up(loss: Loss) -> None:
    logprobs, arrays = example(loss)
    result = evaluate(loss, CONFIG, logprobs, arrays)
    (whole_gradient,) = torch.autograd.grad(result.total, logprobs)
    sums = dict.fromkeys(result.sums, 0.0)
    gradient = torch.zeros_like(logprobs)
    for begin, end in ((0, 37), (37, 37), (37, 200)):  # a rank may have no part at all
        part = evaluate(loss, CONFIG, logprobs[begin:end], {n: array[begin:end] for n, array in arrays.items()})
        gradient += torch.autograd.grad(part.total, logprobs)[0]
        assert part.sums.keys() == sums.keys()
        for name, value in part.sums.items():
            sums[name] += value.item()
    assert torch.equal(gradient, whole_gradient)
    for name, value in result.sums.items():
        assert sums[name] == pytest.approx(value.item(), rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("loss", Loss)
def test_parts_of_representable_numbers_add_up_to_the_last_bit(loss: Loss) -> None:
    logprobs = torch.full((8,), -0.5)
    arrays = {name: torch.arange(-4.0, 4.0) / 8 for name in INPUTS[loss]}
    if "logprobs" in arrays:
        arrays["logprobs"] = logprobs.clone()  # ratio 1
    whole = evaluate(loss, LossConfig(beta=0.25), logprobs, arrays)
    parts = [
        evaluate(loss, LossConfig(beta=0.25), logprobs[part], {name: array[part] for name, array in arrays.items()})
        for part in (slice(0, 3), slice(3, 8))
    ]
    assert whole.total.item() == parts[0].total.item() + parts[1].total.item()
    for name, value in whole.sums.items():
        assert value.item() == parts[0].sums[name].item() + parts[1].sums[name].item()


@pytest.mark.parametrize("loss", Loss)
def test_the_loss_metric_is_the_total_and_every_position_is_a_token(loss: Loss) -> None:
    logprobs, arrays = example(loss)
    result = evaluate(loss, CONFIG, logprobs, arrays)
    assert numbers(result)["loss:sum"] == result.total.item()
    assert numbers(result)["tokens:sum"] == 200
    assert not any(value.requires_grad for value in result.sums.values())


# advantage, ratio -> value of -min(...) per unit, whether the clipped branch decided
PPO_CASES = {
    "better than expected, inside": (2.0, 1.1, -2.2, False),
    "better, already likelier than the interval allows": (2.0, 2.0, -2.0 * HIGH, True),
    "better, has become unlikelier": (2.0, 0.5, -1.0, False),
    "worse than expected, inside": (-2.0, 1.1, 2.2, False),
    "worse, has become likelier": (-2.0, 2.0, 4.0, False),
    "worse, already unlikelier than the interval allows": (-2.0, 0.5, 2.0 * LOW, True),
}


@pytest.mark.parametrize(("advantage", "ratio", "value", "clipped"), PPO_CASES.values(), ids=PPO_CASES.keys())
def test_ppo_clips_on_the_side_that_the_advantage_favours(
    advantage: float, ratio: float, value: float, clipped: bool
) -> None:
    result, gradient = run(Loss.PPO, lp=[-1.0], logprobs=[-1.0 - math.log(ratio)], advantages=[advantage])
    assert result.total.item() == pytest.approx(value, rel=1e-6)
    assert gradient == [pytest.approx(0.0 if clipped else -advantage * ratio, rel=1e-6)]
    assert numbers(result)["clipped:mean"] == clipped
    assert numbers(result)["ratio:mean"] == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "coefficient"), [(0.5, LOW), (1.1, 1.1), (2.0, HIGH)])
def test_cispo_weighs_the_logprob_with_the_clipped_ratio(advantage: float, ratio: float, coefficient: float) -> None:
    result, gradient = run(Loss.CISPO, lp=[-3.0], logprobs=[-3.0 - math.log(ratio)], advantages=[advantage])
    assert result.total.item() == pytest.approx(3.0 * coefficient * advantage, rel=1e-6)
    assert gradient == [pytest.approx(-coefficient * advantage, rel=1e-6)]
    assert numbers(result)["clipped:mean"] == (coefficient != ratio)


def test_by_default_the_interval_is_from_0_8_to_1_2_and_beta_is_0_05() -> None:
    arrays = {"lp": [-1.0, -1.0], "logprobs": [-1.0 - math.log(2.0), -1.0 - math.log(0.5)], "advantages": [1.0, -1.0]}
    assert run(Loss.PPO, LossConfig(), **arrays)[0].total.item() == pytest.approx(-1.2 + 0.8)
    assert run(Loss.CISPO, LossConfig(), **arrays)[0].total.item() == pytest.approx(1.2 - 0.8)  # lp is -1
    result, _ = run(Loss.DRO, LossConfig(), lp=[-1.0], logprobs=[-3.0], advantages=[2.0])
    assert result.total.item() == pytest.approx(2.0 + 0.05 / 2 * 4.0)


def test_a_custom_loss_has_the_gradient_that_the_client_sent() -> None:
    result, gradient = run(Loss.CUSTOM, lp=[-1.0, -2.0], logprob_gradients=[0.5, -3.0])
    assert result.total.item() == 5.5
    assert gradient == [0.5, -3.0]


def test_metrics_of_cross_entropy() -> None:
    result, _ = run(Loss.CROSS_ENTROPY, lp=[-1.0, -2.0, -4.0], weights=[0.0, 1.0, 3.0])
    assert numbers(result) == {"loss:sum": 14.0, "tokens:sum": 3.0, "weights:sum": 4.0, "loss:mean": 3.5}
    weightless, _ = run(Loss.CROSS_ENTROPY, lp=[-1.0, -2.0], weights=[1.0, -1.0])
    assert numbers(weightless) == {"loss:sum": -1.0, "tokens:sum": 2.0, "weights:sum": 0.0}


def test_metrics_of_losses_with_a_ratio_leave_out_positions_without_advantage() -> None:
    arrays = {
        "lp": [-1.0] * 4,
        "logprobs": [-1.0, -1.0 - math.log(2.0), -9.0, 0.0],
        "advantages": [1.0, 1.0, 0.0, 0.0],
    }
    names = {"loss:sum", "tokens:sum"}
    assert run(Loss.DRO, **arrays)[0].sums.keys() == {"loss", "tokens"}
    for loss, extra in (
        (Loss.IMPORTANCE_SAMPLING, set()),
        (Loss.PPO, {"clipped:mean"}),
        (Loss.CISPO, {"clipped:mean"}),
    ):
        measured = numbers(run(loss, **arrays)[0])
        assert measured.keys() == names | {"ratio:mean"} | extra
        assert measured["ratio:mean"] == pytest.approx(1.5)
        assert measured.get("clipped:mean", 0.5) == 0.5
        arrays_without = arrays | {"advantages": [0.0] * 4}
        assert numbers(run(loss, **arrays_without)[0]) == {"loss:sum": 0.0, "tokens:sum": 4.0}


@pytest.mark.parametrize("loss", [Loss.PPO, Loss.CISPO])
def test_a_position_without_advantage_is_never_clipped_also_when_1_is_outside_the_interval(loss: Loss) -> None:
    arrays = {"lp": [-1.0, -1.0], "logprobs": [-1.0 - math.log(1.3), -1.0], "advantages": [1.0, 0.0]}
    result, _ = run(loss, LossConfig(clip_low_threshold=1.1, clip_high_threshold=1.5), **arrays)
    assert numbers(result)["clipped:mean"] == 0.0


@pytest.mark.parametrize("loss", [Loss.IMPORTANCE_SAMPLING, Loss.PPO, Loss.CISPO])
def test_a_position_without_advantage_may_have_any_sampling_logprob(loss: Loss) -> None:
    result, gradient = run(loss, lp=[-1.0, -1.0, -1.0], logprobs=[-1.0, -1000.0, -math.inf], advantages=[1.0, 0.0, 0.0])
    assert math.isfinite(result.total.item())
    assert gradient == [-1.0, 0.0, 0.0]


def test_ppo_holds_a_ratio_beyond_float32_at_the_bound() -> None:
    result, gradient = run(Loss.PPO, lp=[-1.0], logprobs=[-1000.0], advantages=[2.0])
    assert result.total.item() == pytest.approx(-2.0 * HIGH)
    assert gradient == [0.0]


NOT_FINITE = {
    Loss.CROSS_ENTROPY: {"lp": [-1e30, -1.0], "weights": [1e30, 1.0]},
    Loss.IMPORTANCE_SAMPLING: {"lp": [-1.0, -1.0], "logprobs": [-1000.0, -1.0], "advantages": [1.0, 1.0]},
    Loss.PPO: {"lp": [-1.0, -1.0], "logprobs": [-1000.0, -1.0], "advantages": [-1.0, 1.0]},
    Loss.CISPO: {"lp": [-1e30, -1.0], "logprobs": [-1e30, -1.0], "advantages": [1e30, 1.0]},
    Loss.DRO: {"lp": [-1e30, -1.0], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]},
    Loss.CUSTOM: {"lp": [-1e30, -1.0], "logprob_gradients": [1e30, 1.0]},
}


@pytest.mark.parametrize("loss", Loss)
def test_an_overflow_or_nan_makes_the_total_not_finite(loss: Loss) -> None:
    assert math.isinf(run(loss, **NOT_FINITE[loss])[0].total.item())
    with_nan = NOT_FINITE[loss] | {"lp": [math.nan, -1.0]}
    assert math.isnan(run(loss, **with_nan)[0].total.item())


def test_what_each_loss_takes() -> None:
    assert INPUTS.keys() == set(Loss)
    assert [name for names in INPUTS.values() for name in names if name in INPUT_DEFAULTS] == ["weights"]
    assert INPUT_DEFAULTS == {"weights": 1.0}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("clip_low_threshold", {"clip_low_threshold": -0.1}),
        ("clip_low_threshold", {"clip_low_threshold": math.nan}),
        ("clip_high_threshold", {"clip_high_threshold": math.inf}),
        ("clip_high_threshold", {"clip_low_threshold": 1.3}),
        ("beta", {"beta": -1e-9}),
        ("beta", {"beta": math.inf}),
    ],
)
def test_numbers_out_of_range_are_refused(field: str, values: dict[str, float]) -> None:
    with pytest.raises(ServiceError) as refusal:
        LossConfig(**values)
    assert (refusal.value.code, refusal.value.reason) == (Code.INVALID_ARGUMENT, "LOSS_CONFIG_OUT_OF_RANGE")
    assert refusal.value.field == f"loss_config.{field}"


def test_the_ends_of_the_ranges_are_allowed() -> None:
    LossConfig(clip_low_threshold=0.0, clip_high_threshold=0.0, beta=0.0)
