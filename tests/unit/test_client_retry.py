"""What the client does when no answer comes."""

import time

import numpy as np
import pytest
from client_fakes import WEIGHTS, Fakes

import tinkerbell
from service_common import errors
from tinkerbell import Datum, Retry, TrainerClient

DATA = [Datum([1, 2, 3], [2, 3, 4])]
FAST = Retry(total_seconds=10, first_backoff_seconds=0.01)

MUTATIONS = {
    "create": lambda trainer, run: trainer.create_lora_adapter("bob"),
    "remove": lambda trainer, run: run.remove(),
    "import": lambda trainer, run: trainer.import_adapter_weights("bob", WEIGHTS, rank=8, alpha=16),
    "run.import": lambda trainer, run: run.import_adapter_weights(WEIGHTS).result(),
    "forward": lambda trainer, run: trainer.forward(DATA, "alice").result(),
    "run.forward": lambda trainer, run: run.forward(DATA).result(),
    "forward_backward": lambda trainer, run: run.forward_backward(DATA).result(),
    "optim_step": lambda trainer, run: run.optim_step().result(),
    "sync": lambda trainer, run: trainer.sync_adapter_to_vllm("alice").result(),
    "run.sync": lambda trainer, run: run.sync_adapter_to_vllm().result(),
    "save": lambda trainer, run: run.save_checkpoint("other").result(),
    "load": lambda trainer, run: run.load_checkpoint("alice/first").result(),
    "delete": lambda trainer, run: trainer.delete_checkpoint("alice/first"),
}


@pytest.fixture
def fakes():
    with Fakes().running() as running:
        yield running


def run_with_a_checkpoint(trainer):
    run = trainer.create_lora_adapter("alice", rank=8, alpha=16)
    run.save_checkpoint("first").result()
    return run


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_lost_answer_is_asked_for_with_the_very_same_request(fakes, mutation):
    with TrainerClient(fakes.trainer_address, retry=FAST) as trainer:
        run = run_with_a_checkpoint(trainer)
        fakes.trainer.attempts.clear()
        done = len(fakes.trainer.answers)
        fakes.trainer.lost_answers = 2
        MUTATIONS[mutation](trainer, run)
        first, *others = fakes.trainer.attempts
        assert others == [first, first]
        assert len(fakes.trainer.answers) == done + 1
        run.optim_step().result()
        assert fakes.trainer.requests[-1].seq_id in {2, 3}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_refusal_is_final_and_keeps_the_order(fakes, mutation):
    with TrainerClient(fakes.trainer_address, retry=FAST) as trainer:
        run = run_with_a_checkpoint(trainer)
        fakes.trainer.attempts.clear()
        fakes.trainer.refusal = errors.unavailable("SAMPLER_UNREACHABLE", "the sampler is away")
        with pytest.raises(tinkerbell.UnavailableError) as caught:
            MUTATIONS[mutation](trainer, run)
        assert caught.value.reason == "SAMPLER_UNREACHABLE"
        assert len(fakes.trainer.attempts) == 1
        fakes.trainer.refusal = None
        run.optim_step().result()


def test_every_request_has_an_id_of_its_own(fakes):
    with TrainerClient(fakes.trainer_address) as trainer:
        run = run_with_a_checkpoint(trainer)
        for _ in range(5):
            run.optim_step().result()
    assert len({request.request_id for request in fakes.trainer.attempts}) == 7


def test_run_ends_when_all_attempts_fail(fakes):
    retry = Retry(total_seconds=0.2, first_backoff_seconds=0.01)
    with TrainerClient(fakes.trainer_address, retry=retry) as trainer:
        run = trainer.create_lora_adapter("alice")
        fakes.trainer.lost_answers = 10**6
        began = time.monotonic()
        with pytest.raises(tinkerbell.UnavailableError, match="the connection broke"):
            run.optim_step().result()
        assert time.monotonic() - began < 2
        assert 3 <= len(fakes.trainer.attempts) < 30
        fakes.trainer.lost_answers = 0
        with pytest.raises(tinkerbell.FailedPreconditionError) as caught:
            run.optim_step()
        assert caught.value.reason == "OPERATION_UNANSWERED"
        assert len(fakes.trainer.requests) == 1


def test_no_retry_means_one_attempt(fakes):
    with TrainerClient(fakes.trainer_address, retry=Retry(total_seconds=0)) as trainer:
        fakes.trainer.lost_answers = 1
        with pytest.raises(tinkerbell.UnavailableError):
            trainer.create_lora_adapter("alice")
    assert len(fakes.trainer.attempts) == 1


def test_attempt_that_takes_too_long_counts_as_unanswered(fakes):
    with TrainerClient(fakes.trainer_address, retry=Retry(attempt_seconds=0.05)) as trainer:
        run = trainer.create_lora_adapter("alice")
        fakes.trainer.gate.clear()
        loss = run.forward_backward(DATA)
        deadline = time.monotonic() + 5
        while len(fakes.trainer.attempts) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        fakes.trainer.gate.set()
        assert loss.result().loss == 2.5
    assert fakes.trainer.seq_ids() == [1]


def test_timeout_holds_for_all_attempts_together(fakes):
    with TrainerClient(fakes.trainer_address, timeout=0.3, retry=FAST) as trainer:
        fakes.trainer.lost_answers = 10**6
        began = time.monotonic()
        with pytest.raises((tinkerbell.UnavailableError, tinkerbell.DeadlineExceededError)):
            trainer.create_lora_adapter("alice")
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("reason", ["SEQ_ID_USED", "SEQ_ID_GAP", "ADAPTER_RESTORED"])
def test_run_ends_when_the_trainer_s_order_is_another(fakes, reason):
    with TrainerClient(fakes.trainer_address) as trainer:
        run = trainer.create_lora_adapter("alice")
        fakes.trainer.refusal = errors.failed_precondition(reason, "out of step", step=4, next_seq_id=9)
        with pytest.raises(tinkerbell.FailedPreconditionError):
            run.optim_step().result()
        fakes.trainer.refusal = None
        with pytest.raises(tinkerbell.FailedPreconditionError) as caught:
            run.optim_step()
        assert caught.value.reason == reason
        assert caught.value.metadata == {"step": "4", "next_seq_id": "9"}
        trainer.training_run("alice").optim_step().result()


def test_import_of_many_chunks_survives_a_lost_answer(fakes):
    weights = {name: np.tile(array, (1, 4) if "lora_A" in name else (4, 1)) for name, array in WEIGHTS.items()}
    with TrainerClient(fakes.trainer_address, retry=FAST) as trainer:
        for _ in range(5):  # the trainer answers while chunks are still being written, which grpc.aio takes badly
            fakes.trainer.lost_answers = 2
            trainer.import_adapter_weights("alice", weights, rank=8, alpha=16)
    manifest, content = fakes.trainer.imported["alice"]
    assert content == b"".join(array.tobytes() for array in weights.values())
    assert len(content) > 4 << 20
    assert manifest.lora.rank == 8
