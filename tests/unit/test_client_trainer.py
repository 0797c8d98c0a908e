import concurrent.futures
import datetime
import threading
import time

import numpy as np
import pytest
from client_fakes import FINGERPRINT, WEIGHTS, Fakes

import tinkerbell
from tinkerbell import AdamParams, Datum, TrainerClient, TrainingRun, _order
from tinkerbell.local import free_address

DATA = [Datum([1, 2, 3], [2, 3, 4]), Datum([5], [6])]


@pytest.fixture
def fakes():
    with Fakes().running() as running:
        yield running


@pytest.fixture
def trainer(fakes):
    with TrainerClient(fakes.trainer_address, timeout=10) as client:
        yield client


@pytest.fixture
def run(trainer):
    return trainer.create_lora_adapter("alice", rank=8, alpha=16)


def test_base_model_is_described_after_progress_in_the_callers_thread(trainer):
    seen = []
    model = trainer.initialize_base_model("tiny", on_progress=lambda step: seen.append((step, threading.get_ident())))
    assert (model.fingerprint, model.dtype) == (FINGERPRINT, "bfloat16")
    assert [step.stage for step, _ in seen] == ["building", "ready"]
    assert {thread for _, thread in seen} == {threading.get_ident()}


def test_errors_are_typed_with_reason_and_metadata(trainer, run):
    with pytest.raises(tinkerbell.AlreadyExistsError, match=r"adapter 'alice' exists \[ADAPTER_EXISTS\]") as caught:
        trainer.create_lora_adapter("alice")
    assert caught.value.reason == "ADAPTER_EXISTS"
    assert caught.value.metadata == {"adapter_id": "alice"}
    assert caught.value.code.name == "ALREADY_EXISTS"
    with pytest.raises(tinkerbell.InvalidArgumentError) as caught:
        run.optim_step(learning_rate=-1).result()
    assert caught.value.reason == "LEARNING_RATE_OUT_OF_RANGE"
    with pytest.raises(tinkerbell.NotFoundError):
        trainer.training_run("nobody")


def test_unexpected_failures_are_internal_errors_without_a_reason(fakes, trainer, run):
    fakes.trainer.adapters = None
    with pytest.raises(tinkerbell.InternalError, match="the trainer at 127") as caught:
        trainer.list_lora_adapters()
    assert caught.value.reason == ""


@pytest.mark.parametrize("call", ["list_lora_adapters", "list_optimizer_states", "get_backend_info"])
def test_unreachable_trainer_is_an_error_and_not_a_hang(call):
    address = free_address()
    began = time.monotonic()
    with TrainerClient(address) as client, pytest.raises(tinkerbell.UnavailableError, match=address):
        getattr(client, call)()
    assert time.monotonic() - began < 5


def test_run_carries_everything_there_and_back(fakes, run):
    result = run.forward_backward(DATA).result()
    assert [scores.tolist() for scores in result.logprobs] == [[0, -1, -2], [0]]
    assert result.logprobs[0].dtype == np.float32
    assert result.loss == 2.5
    assert run.forward(DATA).result().loss == 1.5
    step = run.optim_step(AdamParams(learning_rate=0.1, beta1=0.5), grad_clip_norm=2.0).result()
    assert (step.step, step.grad_norm) == (3, 2.0)
    sync = run.sync_adapter_to_vllm().result()
    assert (sync.version, sync.transport, sync.sent_bytes) == (7, "grpc", 10)
    assert [(replica.address, replica.state, replica.error) for replica in sync.replicas] == [
        ("a:1", "committed", ""),
        ("b:1", "down", "gone"),
    ]
    assert sync.replicas[0].difference is None
    probe = tinkerbell.Verification([[1, 2], [3, 4]], tolerance=0.5)
    assert run.sync_adapter_to_vllm(verify=True).result().replicas[0].difference.tokens == 0
    assert run.sync_adapter_to_vllm(verify=probe).result().replicas[0].difference.tokens == 2
    verified = run.verify_adapter(probe).result()
    assert (verified.version, verified.steps_since) == (7, 2)
    assert verified.replicas[0].agrees
    assert verified.replicas[0].difference.mean == 0.5
    adam = fakes.trainer.requests[2].adam
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.eps) == (0.1, 0.5, 0.95, 1e-12)
    assert {request.adapter_id for request in fakes.trainer.requests} == {"alice"}
    state = run.get_optimizer_state()
    assert state.last_adam == AdamParams(learning_rate=0.5, beta1=0.1)
    run.remove()
    assert not fakes.trainer.adapters


def test_pipelined_calls_are_numbered_in_program_order(fakes, run):
    futures = []
    for _ in range(20):
        futures += [run.forward_backward(DATA), run.optim_step(learning_rate=1e-3)]
    concurrent.futures.wait(futures)
    by_number = sorted(fakes.trainer.requests, key=lambda request: request.seq_id)
    assert [request.seq_id for request in by_number] == list(range(1, 41))
    assert [hasattr(request, "adam") for request in by_number] == [False, True] * 20


def test_numbers_are_unique_and_gapless_across_threads(fakes, run):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(run.optim_step, learning_rate=1e-3) for _ in range(200)]
        results = [call.result().result() for call in calls]
    assert sorted(result.step for result in results) == list(range(1, 201))
    assert sorted(fakes.trainer.seq_ids()) == list(range(1, 201))


def test_invalid_arguments_take_no_number(fakes, run, monkeypatch):
    with pytest.raises(AttributeError):
        run.forward_backward(["no datum"])
    with pytest.raises(TypeError):
        run.optim_step(momentum=0.9)
    with pytest.raises(TypeError):
        run.optim_step(learning_rate="fast")
    with pytest.raises(ValueError, match="is not one of"):
        run.export_adapter_weights(dtype="float8")
    monkeypatch.setattr(_order, "MAX_MESSAGE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"takes \d+ bytes, and 1000 is the most"):
        run.forward_backward([Datum(range(1000), range(1000))])
    run.optim_step().result()
    assert fakes.trainer.seq_ids() == [1]


def test_cancelled_operations_still_happen(fakes, run):
    futures = [run.optim_step() for _ in range(50)]
    cancelled = [future.cancel() for future in futures]
    assert any(cancelled)
    run.optim_step().result()
    deadline = time.monotonic() + 5
    while len(fakes.trainer.requests) < 51 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(fakes.trainer.seq_ids()) == list(range(1, 52))


def test_run_goes_on_after_a_refusal_and_ends_after_silence(fakes, trainer, run):
    with pytest.raises(tinkerbell.InvalidArgumentError):
        run.optim_step(learning_rate=-1).result()
    run.optim_step().result()
    fakes.trainer.gate.clear()
    with TrainerClient(fakes.trainer_address, timeout=0.2) as impatient:
        short_run = impatient.training_run("alice")
        with pytest.raises(tinkerbell.DeadlineExceededError):
            short_run.forward_backward(DATA).result()
        with pytest.raises(tinkerbell.FailedPreconditionError) as caught:
            short_run.optim_step()
        assert caught.value.reason == "OPERATION_UNANSWERED"
        assert caught.value.metadata["seq_id"] == "1"


def test_training_run_goes_on_where_the_trainer_is(fakes, trainer, run):
    fakes.trainer.adapters["alice"].next_seq_id = 12
    trainer.training_run("alice").optim_step().result()
    assert fakes.trainer.seq_ids() == [12]


def test_calls_by_id_are_not_numbered(fakes, trainer, run):
    trainer.sync_adapter_to_vllm("alice").result()
    trainer.forward(DATA).result()
    dict(trainer.export_adapter_weights("alice"))
    assert fakes.trainer.seq_ids() == [0, 0, 0]
    assert [request.adapter_id for request in fakes.trainer.requests] == ["alice", "", "alice"]


def test_export_gives_the_weights_in_payload_order(fakes, run):
    pairs = list(run.export_adapter_weights())
    assert [name for name, _ in pairs] == list(WEIGHTS)
    for name, array in pairs:
        np.testing.assert_array_equal(array, WEIGHTS[name])
    as_dict = run.export_adapter_weights(as_dict=True)
    assert list(as_dict) == list(WEIGHTS)
    assert not as_dict[pairs[0][0]].flags.writeable
    assert fakes.trainer.seq_ids() == [1, 2]


def test_abandoned_export_still_uses_its_number(fakes, run):
    run.export_adapter_weights()
    run.optim_step().result()
    assert sorted(fakes.trainer.seq_ids()) == [1, 2]


def test_optimizer_is_exported_with_its_moments(fakes, trainer, run):
    ours = run.export_optimizer_state()
    assert (ours.state.step, ours.state.last_adam.learning_rate) == (3, 0.5)
    for moments, factor in ((ours.exp_avg, 2), (ours.exp_avg_sq, 3)):
        assert list(moments) == list(WEIGHTS)
        for name, array in moments.items():
            np.testing.assert_array_equal(array, factor * WEIGHTS[name])
    trainer.export_optimizer_state("alice")
    assert fakes.trainer.seq_ids() == [1, 0]
    fakes.trainer.damage = "bit"
    with pytest.raises(tinkerbell.DataLossError):
        run.export_optimizer_state()


def test_checkpoints_are_saved_loaded_listed_and_deleted(fakes, trainer, run):
    named, by_step = run.save_checkpoint("first", ttl_seconds=60), run.save_checkpoint()
    assert named.result().checkpoint_id == "alice/first"  # calls overtake each other, and the fake does not mind
    run.load_checkpoint("alice/first", fresh_optimizer=True).result()
    assert run.load_checkpoint("alice/first").result().resident
    lifetime = named.result().expires_at - named.result().created_at
    assert abs(lifetime - datetime.timedelta(minutes=1)) < datetime.timedelta(milliseconds=1)  # they are floats
    assert named.result().created_at.utcoffset() == datetime.timedelta(0)
    assert by_step.result().expires_at is None
    assert by_step.result().lora.rank == 8
    assert trainer.list_checkpoints() == trainer.list_checkpoints("alice")
    assert {known.checkpoint_id for known in trainer.list_checkpoints()} == {"alice/first", "alice/step-3"}
    assert trainer.list_checkpoints("bob") == []
    trainer.delete_checkpoint("alice/first")
    assert trainer.list_checkpoints() == [by_step.result()]
    with pytest.raises(tinkerbell.NotFoundError):
        trainer.delete_checkpoint("alice/first")
    by_number = {request.seq_id: request for request in fakes.trainer.requests}
    assert sorted(by_number) == [1, 2, 3, 4]
    assert [by_number[number].fresh_optimizer for number in (3, 4)] == [True, False]


def test_adapter_is_made_fresh_or_of_a_checkpoint(fakes, trainer):
    trainer.create_lora_adapter("fresh", use_rslora=True, target_modules=["q_proj"])
    trainer.create_lora_adapter("copy", from_checkpoint="fresh/best", fresh_optimizer=True)
    fresh, copy = fakes.trainer.attempts
    assert (fresh.lora.rank, fresh.lora.use_rslora, fresh.from_checkpoint) == (32, True, "")
    assert not fresh.lora.HasField("alpha")
    assert (copy.from_checkpoint, copy.fresh_optimizer) == ("fresh/best", True)
    assert not copy.HasField("lora")
    for shape in ({"rank": 8}, {"alpha": 1}, {"target_modules": []}, {"seed": 1}, {"use_rslora": True}):
        with pytest.raises(ValueError, match="leave the other arguments out"):
            trainer.create_lora_adapter("copy", from_checkpoint="fresh/best", **shape)


@pytest.mark.parametrize("damage", ["digest", "bit", "cut"])
def test_damaged_export_is_data_loss(fakes, run, damage):
    fakes.trainer.damage = damage
    with pytest.raises(tinkerbell.DataLossError) as caught:
        run.export_adapter_weights(as_dict=True)
    assert caught.value.reason == "PAYLOAD_DAMAGED"


@pytest.mark.parametrize("blocking", [TrainingRun.get_optimizer_state, TrainingRun.export_adapter_weights])
def test_blocking_in_a_done_callback_is_refused(fakes, run, blocking):
    refused = concurrent.futures.Future()

    def block(_):
        try:
            blocking(run)
        except RuntimeError as error:
            refused.set_result(str(error))

    fakes.trainer.gate.clear()  # the callback of a future that is done would run in this thread
    run.forward_backward(DATA).add_done_callback(block)
    fakes.trainer.gate.set()
    assert "wait for itself" in refused.result(5)


def test_closed_client_says_so(fakes):
    client = TrainerClient(fakes.trainer_address)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.get_backend_info()
