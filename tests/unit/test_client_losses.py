"""Losses, those that the client differentiates included."""

import asyncio
import concurrent.futures
import threading

import numpy as np
import pytest
import torch
from client_fakes import Fakes, FakeTrainer

import tinkerbell
from tinkerbell import Datum, LossConfig, TrainerClient, tensors, torch_loss
from tinkerbell.v1 import trainer_pb2

SAMPLED = [Datum([1, 2], [2, 3], weights=[1, 0], logprobs=[-1, -2], advantages=[0.5, -0.5])]
DATA = [Datum([1, 2, 3], [2, 3, 4], advantages=[1, 2, 3]), Datum([5], [6], advantages=[4])]


@pytest.fixture
def fakes():
    with Fakes().running() as running:
        yield running


@pytest.fixture
def run(fakes):
    with TrainerClient(fakes.trainer_address, timeout=10) as client:
        yield client.create_lora_adapter("alice")


def weighted(data, logprobs):
    """sum_i advantages[i] * logprobs[i] ** 2."""
    assert all(scores.dtype == np.float32 for scores in logprobs)
    pairs = list(zip(data, logprobs, strict=True))
    loss = sum(float((datum.advantages * scores**2).sum()) for datum, scores in pairs)
    return loss, [2 * datum.advantages * scores for datum, scores in pairs]


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        ("cross_entropy", {"weights"}),
        ("importance_sampling", {"logprobs", "advantages"}),
        ("ppo", {"logprobs", "advantages"}),
        ("cispo", {"logprobs", "advantages"}),
        ("dro", {"logprobs", "advantages"}),
    ],
)
def test_each_loss_travels_with_its_inputs_and_no_others(fakes, run, loss, inputs):
    run.forward_backward(SAMPLED, loss).result()
    run.forward(SAMPLED, loss, LossConfig(beta=0.5), clip_high_threshold=1.5).result()
    backward, forward = fakes.trainer.requests
    assert backward.loss == forward.loss == trainer_pb2.LossFunction.Value(f"LOSS_FUNCTION_{loss.upper()}")
    assert set(backward.data[0].loss_inputs) == set(forward.data[0].loss_inputs) == {"target_tokens", *inputs}
    for name in inputs:
        array = tensors.decode(backward.data[0].loss_inputs[name])
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, getattr(SAMPLED[0], name))
    assert not backward.HasField("loss_config")
    # The other threshold is left to the loss, whose default only the service knows.
    numbers = {field.name: value for field, value in forward.loss_config.ListFields()}
    assert numbers == {"clip_high_threshold": 1.5, "beta": 0.5}


def test_what_a_loss_lacks_is_found_before_a_number_is_taken(fakes, run):
    with pytest.raises(ValueError, match="ppo takes logprobs, and the datum has none"):
        run.forward_backward(DATA, "ppo")
    with pytest.raises(ValueError, match="'grpo' is not one of cross_entropy, importance_sampling"):
        run.forward_backward(DATA, "grpo")
    with pytest.raises(TypeError):
        run.forward(SAMPLED, "ppo", clip=0.2)
    run.optim_step().result()
    assert fakes.trainer.seq_ids() == [1]


def test_custom_loss_is_a_forward_and_a_backward_pass_in_order(fakes, run):
    entered, leave = threading.Event(), threading.Event()

    def slow(data, logprobs):
        entered.set()
        assert leave.wait(5)
        return weighted(data, logprobs)

    result = run.forward_backward_custom(DATA, slow)
    step = run.optim_step()
    assert entered.wait(5)
    assert fakes.trainer.seq_ids() == [1]  # the step waits here, not in the trainer
    leave.set()
    assert step.result().step == 3
    assert result.result().loss == 1 * 0 + 2 * 1 + 3 * 4
    assert result.result().metrics["loss:sum"] == 14
    forward, *others = fakes.trainer.requests
    (backward,) = [request for request in others if isinstance(request, trainer_pb2.ForwardBackwardRequest)]
    assert (forward.seq_id, forward.loss, backward.seq_id) == (1, trainer_pb2.LOSS_FUNCTION_CROSS_ENTROPY, 2)
    assert backward.loss == trainer_pb2.LOSS_FUNCTION_CUSTOM
    gradients = [tensors.decode(datum.loss_inputs["logprob_gradients"]).tolist() for datum in backward.data]
    assert gradients == [[0, -4, -12], [0]]  # the fake's logprobs are 0, -1, -2 ...
    assert forward.request_id != backward.request_id


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        ((1.0, [[0, 0, 0]]), "1 gradients for 2 data"),
        ((1.0, [[0, 0], [0]]), r"shape \(2,\) for datum 0 with 3 tokens"),
        (ZeroDivisionError("my own"), "my own"),
    ],
)
def test_failing_custom_loss_spends_its_numbers_and_adds_nothing(fakes, run, returned, complaint):
    def loss(data, logprobs):
        if isinstance(returned, Exception):
            raise returned
        return returned

    result = run.forward_backward_custom(DATA, loss)
    step = run.optim_step()
    with pytest.raises((ValueError, ZeroDivisionError), match=complaint):
        result.result()
    assert step.result().step == 3
    assert sorted(fakes.trainer.seq_ids()) == [1, 2, 3]
    assert not any(isinstance(request, trainer_pb2.ForwardBackwardRequest) for request in fakes.trainer.requests)


def test_unanswered_custom_loss_ends_the_run_and_what_was_called_after_it(fakes):
    with TrainerClient(fakes.trainer_address, retry=tinkerbell.Retry(total_seconds=0)) as client:
        run = client.create_lora_adapter("alice")
        fakes.trainer.lost_answers = 1
        result, step = run.forward_backward_custom(DATA, weighted), run.optim_step()
        with pytest.raises(tinkerbell.UnavailableError):
            result.result()
        with pytest.raises(tinkerbell.FailedPreconditionError) as caught:
            step.result(5)
        assert caught.value.reason == "OPERATION_UNANSWERED"
    assert fakes.trainer.seq_ids() == [1]


def test_closing_the_client_ends_what_was_called_after_a_custom_loss(monkeypatch):
    asked = threading.Event()

    async def unanswered(trainer, request, context):
        asked.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(FakeTrainer, "Forward", unanswered)
    with Fakes().running() as fakes:
        client = TrainerClient(fakes.trainer_address)
        run = client.create_lora_adapter("alice")
        result, step = run.forward_backward_custom(DATA, weighted), run.optim_step()
        assert asked.wait(10)
        client.close()
        with pytest.raises(concurrent.futures.CancelledError):
            result.result(10)
        with pytest.raises(tinkerbell.FailedPreconditionError) as caught:
            step.result(10)
        assert caught.value.reason == "OPERATION_UNANSWERED"


def test_custom_loss_in_torch_has_torch_s_gradient():
    @torch_loss
    def loss(data, logprobs):
        return sum(
            (torch.tensor(datum.advantages) * scores**2).sum() for datum, scores in zip(data, logprobs, strict=True)
        )

    logprobs = [np.array([-0.5, -1, -2], np.float32), np.array([-3], np.float32)]
    (ours, gradients), (expected, derivatives) = loss(DATA, logprobs), weighted(DATA, logprobs)
    assert ours == pytest.approx(expected, rel=1e-6)
    for gradient, derivative in zip(gradients, derivatives, strict=True):
        np.testing.assert_allclose(gradient, derivative, rtol=1e-6)


def test_datum_that_a_torch_loss_leaves_out_gets_no_gradient():
    loss, gradients = torch_loss(lambda data, logprobs: logprobs[0].sum())(
        DATA, [np.ones(3, np.float32), np.ones(1, np.float32)]
    )
    assert loss == 3
    assert [gradient.tolist() for gradient in gradients] == [[1, 1, 1], [0]]


async def test_custom_loss_over_asyncio(fakes):
    async with tinkerbell.AsyncTrainerClient(fakes.trainer_address) as trainer:
        run = await trainer.create_lora_adapter("alice")
        result, step = run.forward_backward_custom(DATA, weighted), run.optim_step()
        assert (await step).step == 3
        assert (await result).loss == 14
