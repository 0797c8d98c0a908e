"""Tenants that share a pass get what each would have got alone.

Tolerance: 1e-5 relative in float32 for log-probabilities, gradients and the weights after five steps; with a bfloat16
base model 5e-2, since a pass of another size rounds otherwise.
"""

import dataclasses
from collections.abc import Sequence

import device
import numpy as np
import pytest
import torch
from engine_calls import arena_of, forward_backward, part, random_datum
from processes import made_model

from service_common import checkpoint
from service_common.errors import ServiceError
from tinkerbell.v1 import common_pb2
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.engine import Engine, Limits, Tensors
from trainer_service.losses import Loss
from trainer_service.passes import Part, PartResult

pytestmark = pytest.mark.engine

TOLERANCE = device.tolerance(1e-5, 5e-2)
STEPS = 5

# rank, alpha, rsLoRA, modules (none: all seven), loss, learning rate
TENANTS = {
    "ada": (8, 16.0, False, [], Loss.CROSS_ENTROPY, 1e-3),
    "bob": (1, 1.0, False, ["q_proj"], Loss.CROSS_ENTROPY, 1e-2),
    "cy": (3, 32.0, True, ["k_proj", "o_proj", "up_proj"], Loss.PPO, 1e-3),
    "dee": (16, 8.0, False, ["v_proj", "down_proj"], Loss.CISPO, 3e-4),
    "eve": (5, 5.0, True, [], Loss.DRO, 1e-3),
    "fay": (12, 24.0, False, ["gate_proj", "up_proj", "down_proj"], Loss.IMPORTANCE_SAMPLING, 2e-3),
    "gus": (4, 64.0, False, ["q_proj", "k_proj", "v_proj", "o_proj"], Loss.CUSTOM, 1e-3),
    "hal": (7, 7.0, False, [], Loss.CROSS_ENTROPY, 5e-3),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    loaded = Engine(device.of_engine(), Limits())
    loaded.load_base_model(checkpoint.resolve(str(made_model("tiny-qwen3", "tiny", "qwen3"))), lambda stage: None)
    return loaded


@pytest.fixture
def tenants(engine: Engine):
    """Each tenant twice: "ada" shares its passes, "ada-alone" does not."""
    for number, (name, (rank, alpha, rslora, modules, _, _)) in enumerate(TENANTS.items()):
        config = common_pb2.LoraConfig(rank=rank, alpha=alpha, use_rslora=rslora, target_modules=modules)
        for adapter_id in (name, f"{name}-alone"):
            engine.create_adapter(adapter_id, config, seed=number)
            weights = arena_of(engine, adapter_id).weights
            generator = torch.Generator().manual_seed(number)
            noise = torch.empty(weights.shape).normal_(0, 0.03, generator=generator)
            weights += noise.to(weights.device)  # B too, which starts at zero
    yield engine
    for name in TENANTS:
        engine.remove_adapter(name)
        engine.remove_adapter(f"{name}-alone")


def batches(engine: Engine, seed: int) -> dict[str, list[Datum]]:
    rng = np.random.default_rng(seed)
    assert engine.checkpoint is not None
    vocab_size = engine.checkpoint.vocab_size
    return {
        name: [random_datum(rng, length, vocab_size, loss) for length in rng.integers(1, 30, 1 + number % 3)]
        for number, (name, (*_, loss, _)) in enumerate(TENANTS.items())
    }


def shared_pass(engine: Engine, data: dict[str, list[Datum]]) -> dict[str, PartResult]:
    parts: list[Part] = [part(name, data[name], TENANTS[name][4]) for name in data]
    return dict(zip(data, engine.run_pass(parts), strict=True))


def assert_close(ours: np.ndarray | torch.Tensor, alone: np.ndarray | torch.Tensor, what: str) -> None:
    difference, scale = (float(torch.as_tensor(values).norm()) for values in (ours - alone, alone))
    assert difference <= TOLERANCE * scale, f"{what}: {difference / scale:.1e}"


def logprobs(results: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(results)


def test_a_mixed_batch_equals_each_tenant_alone(tenants: Engine) -> None:
    for step in range(STEPS):
        data = batches(tenants, seed=step)
        together = shared_pass(tenants, data)
        for name, (*_, loss, learning_rate) in TENANTS.items():
            alone = forward_backward(tenants, f"{name}-alone", data[name], loss)
            assert_close(logprobs(together[name].logprobs), logprobs(alone.logprobs), f"{name}'s logprobs")
            assert together[name].sums.keys() == alone.sums.keys()
            for key, value in alone.sums.items():
                assert together[name].sums[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE / 10)
            gradients, gradients_alone = (arena_of(tenants, i).gradients for i in (name, f"{name}-alone"))
            assert gradients_alone.norm() > 0
            assert_close(gradients, gradients_alone, f"{name}'s gradients")
            # An eps above the gradients' rounding error, or Adam would step by that error's sign.
            params = AdamParams(learning_rate=learning_rate, eps=1e-4, weight_decay=0.01, grad_clip_norm=10.0)
            for adapter_id in (name, f"{name}-alone"):
                tenants.optim_step(adapter_id, params)
    for name in TENANTS:
        assert_close(arena_of(tenants, name).weights, arena_of(tenants, f"{name}-alone").weights, f"{name}'s weights")


@pytest.mark.parametrize("cause", ["loss", "weights"])
def test_a_tenant_that_is_not_finite_leaves_the_others_bit_identical(tenants: Engine, cause: str) -> None:
    """The same batch twice, with everything finite and with one tenant broken: by its loss, or by its weights."""
    data = batches(tenants, seed=99)
    together = shared_pass(tenants, data)
    gradients = {name: arena_of(tenants, name).gradients.clone() for name in TENANTS}
    for name in TENANTS:
        tenants._adapters[name].accumulated_calls = 0
        arena_of(tenants, name).gradients.zero_()

    # Fay already has a gradient, which must survive.
    forward_backward(tenants, "fay", data["fay"], TENANTS["fay"][4])
    before = arena_of(tenants, "fay").gradients.clone()
    broken = dict(data)
    if cause == "loss":
        first = data["fay"][0]
        inputs = {**first.inputs, "logprobs": np.full_like(first.inputs["logprobs"], -1e4)}  # exp(1e4 - ...)
        broken["fay"] = [Datum(first.tokens, first.target_tokens, inputs), *data["fay"][1:]]
    else:
        arena_of(tenants, "fay").weights.fill_(torch.nan)
    again = shared_pass(tenants, broken)

    refusal = again["fay"].refusal
    assert refusal is not None
    assert refusal.reason == "LOSS_NOT_FINITE"
    assert torch.equal(arena_of(tenants, "fay").gradients, before)
    for name in TENANTS:
        if name == "fay":
            continue
        assert again[name].refusal is None
        assert np.array_equal(logprobs(again[name].logprobs), logprobs(together[name].logprobs)), name
        assert torch.equal(arena_of(tenants, name).gradients, gradients[name]), name
        assert gradients[name].norm() > 0


def test_logits_of_a_few_tokens_at_a_time_train_the_same(tenants: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer_service.megatron import logprobs as chunked  # noqa: PLC0415  (after the engine has loaded)

    data = batches(tenants, seed=8)
    together = shared_pass(tenants, data)
    gradients = {name: arena_of(tenants, name).gradients.clone() for name in TENANTS}
    for name in TENANTS:
        tenants._adapters[name].accumulated_calls = 0
        arena_of(tenants, name).gradients.zero_()
    monkeypatch.setattr(chunked, "_CHUNK_TOKENS", 7)
    again = shared_pass(tenants, data)
    for name in TENANTS:
        assert_close(logprobs(again[name].logprobs), logprobs(together[name].logprobs), f"{name}'s logprobs")
        assert_close(arena_of(tenants, name).gradients, gradients[name], f"{name}'s gradients")


def test_recomputed_activations_train_the_same(tenants: Engine, monkeypatch) -> None:
    """Bit for bit on a CPU: the same operations run again."""
    engine = Engine(device.of_engine(), Limits(), recompute_activations=True)
    assert tenants.checkpoint is not None
    assert tenants._model is not None
    monkeypatch.setattr(tenants._model, "_graphs", None)  # what they keep, nobody counts
    engine.load_base_model(tenants.checkpoint, lambda stage: None)
    for number, (name, (rank, alpha, rslora, modules, _, _)) in enumerate(TENANTS.items()):
        config = common_pb2.LoraConfig(rank=rank, alpha=alpha, use_rslora=rslora, target_modules=modules)
        engine.create_adapter(name, config, seed=number)
        arena_of(engine, name).weights.copy_(arena_of(tenants, name).weights)
    data = batches(tenants, seed=7)
    saved: list[int] = []
    for each in (tenants, engine):
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            shared_pass(each, data)
        saved.append(kept)
    for name in TENANTS:
        ours, plain = (arena_of(each, name).gradients for each in (engine, tenants))
        if device.name == "cpu":
            assert torch.equal(ours, plain), name
        assert_close(ours, plain, name)
        assert ours.norm() > 0
    assert saved[1] < saved[0] / 2


def test_forward_beside_forward_backward_leaves_no_gradient(tenants: Engine) -> None:
    data = batches(tenants, seed=5)
    parts = [part(name, data[name], TENANTS[name][4], backward=name != "ada") for name in TENANTS]
    parts.append(part("", data["hal"], Loss.CROSS_ENTROPY, backward=False))
    results = tenants.run_pass(parts)
    assert not arena_of(tenants, "ada").gradients.any()
    base = forward_backward(tenants, "", data["hal"], Loss.CROSS_ENTROPY, backward=False)
    assert_close(logprobs(results[-1].logprobs), logprobs(base.logprobs), "the base model's logprobs")
    assert np.abs(logprobs(results[-1].logprobs) - logprobs(results[-2].logprobs)).max() > 1e-3


def test_a_pass_that_misses_an_adapter_leaves_nothing_of_a_call_that_is_half_done(tenants: Engine) -> None:
    data = batches(tenants, seed=0)
    forward_backward(tenants, "ada", data["ada"])
    before = arena_of(tenants, "ada").gradients.clone()
    half = dataclasses.replace(part("ada", data["ada"]), is_last=False)
    tenants.run_pass([half])
    with pytest.raises(ServiceError, match="nobody"):
        tenants.run_pass([part("ada", data["ada"]), part("nobody", data["bob"])])
    assert torch.equal(arena_of(tenants, "ada").gradients, before)
    assert tenants.optim_step("ada", AdamParams(learning_rate=0.0)).step == 1


def test_weights_are_not_replaced_between_the_passes_of_a_call(tenants: Engine) -> None:
    data = batches(tenants, seed=0)
    half = dataclasses.replace(part("ada", data["ada"]), is_last=False)
    tenants.run_pass([half])
    before = arena_of(tenants, "ada").weights.clone()
    weights = {name: np.zeros_like(value) for name, value in tenants.tensors("ada").weights.items()}
    with pytest.raises(ServiceError) as refusal:
        tenants.replace_weights("ada", Tensors(weights))
    assert refusal.value.reason == "FORWARD_BACKWARD_RUNNING"
    assert torch.equal(arena_of(tenants, "ada").weights, before)
    tenants.run_pass([part("ada", data["ada"])])
    tenants.replace_weights("ada", Tensors(weights))
    assert not arena_of(tenants, "ada").gradients.any()
