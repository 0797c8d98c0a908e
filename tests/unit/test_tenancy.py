"""The trainer between its clients and an engine that only notes what it is asked for."""

import asyncio
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from service_common import errors, lora
from service_common.errors import ServiceError
from tinkerbell.v1 import common_pb2, trainer_pb2
from trainer_service import trainer as trainer_module
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.checkpoints import CheckpointStore
from trainer_service.engine import AdapterInfo, Engine, Limits, OptimizerState, StepResult, Tensors
from trainer_service.losses import Loss, LossConfig
from trainer_service.metrics import Metrics
from trainer_service.parallel import Layout
from trainer_service.passes import PartResult
from trainer_service.trainer import Trainer

CONFIG = lora.normalized(common_pb2.LoraConfig(rank=1, target_modules=["o_proj"]), 64)
DATA = [Datum(np.array([1]), np.array([2]), {"weights": np.ones(1, np.float32)})]
MODEL = SimpleNamespace(name="model", fingerprint="f" * 64, vocab_size=10, max_sequence_length=10)
WEIGHTS = {lora.peft_name(lora.module_path(0, "o_proj"), half): np.ones((1, 1), np.float32) for half in "AB"}


class NotingExecutor:
    """Does what the trainer needs to go on; a method in `gates` waits for its event."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.done: list[str] = []
        self.adapters: dict[str, AdapterInfo] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def run(self, method: Callable, *args, **_):
        name = method.__name__
        if name in self.gates:
            await self.gates[name].wait()
        result = getattr(self, f"_{name}")(*args)
        self.done.append(name)
        return result

    def close(self) -> None:
        pass

    def _load_base_model(self, checkpoint, report) -> None:
        self.engine.checkpoint = checkpoint

    def _create_adapter(self, adapter_id, config, seed, tensors=None, step=0, last_adam=None) -> AdapterInfo:
        return self.adapters.setdefault(adapter_id, AdapterInfo(adapter_id, config, seed, 2, step, True))

    def _remove_adapter(self, adapter_id) -> None:
        del self.adapters[adapter_id]

    def _info(self, adapter_id) -> AdapterInfo:
        return self.adapters[adapter_id]

    def _list_adapters(self) -> list[AdapterInfo]:
        return list(self.adapters.values())

    def _run_pass(self, parts) -> list[PartResult]:
        assert all(part.adapter_id in self.adapters for part in parts)
        return [PartResult([np.zeros(1, np.float32)], {"loss": 0.0, "tokens": 1.0}) for _ in parts]

    def _tensors(self, adapter_id) -> Tensors:
        return Tensors(WEIGHTS, WEIGHTS, WEIGHTS)

    def _optim_step(self, adapter_id, params) -> StepResult:
        info = self.adapters[adapter_id] = dataclasses.replace(
            self.adapters[adapter_id], step=self.adapters[adapter_id].step + 1
        )
        return StepResult(info.step, 1.0)

    def _optimizer_state(self, adapter_id) -> OptimizerState:
        return OptimizerState(adapter_id, self.adapters[adapter_id].step, None, 0, 32)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Makes a trainer, as if the process began, and its executor; all have the same checkpoint folder."""
    monkeypatch.setattr(trainer_module.checkpoints, "resolve", lambda name: MODEL)

    def start() -> tuple[Trainer, NotingExecutor]:
        engine = Engine(torch.device("cpu"), Limits(), Layout())
        executor = NotingExecutor(engine)
        return Trainer(engine, executor, Metrics(), store=CheckpointStore(tmp_path)), executor

    return start


@pytest.fixture
async def loaded(started):
    trainer, executor = started()
    await trainer.load_base_model("model", lambda stage: None)
    await trainer.create_adapter("alice", CONFIG, 0)
    return trainer, executor


def forward_backward(trainer: Trainer, adapter_id: str = "alice", seq_id: int = 0) -> asyncio.Task:
    async def work() -> trainer_pb2.ForwardBackwardResponse:
        async with trainer.turn(adapter_id, seq_id):
            await trainer.compute(adapter_id, DATA, Loss.CROSS_ENTROPY, LossConfig(), backward=True)
        return trainer_pb2.ForwardBackwardResponse()

    request = trainer_pb2.ForwardBackwardRequest(adapter_id=adapter_id, seq_id=seq_id)
    return asyncio.create_task(trainer.once(adapter_id, request, work))


def save(trainer: Trainer, adapter_id: str = "alice", ttl_seconds: float = 0) -> asyncio.Task:
    async def work() -> trainer_pb2.SaveCheckpointResponse:
        async with trainer.turn(adapter_id, 0, alone=True) as turn:
            await trainer.save_checkpoint(adapter_id, "", ttl_seconds, turn)
        return trainer_pb2.SaveCheckpointResponse()

    return asyncio.create_task(trainer.once(adapter_id, trainer_pb2.SaveCheckpointRequest(), work))


async def until_done(executor: NotingExecutor, name: str) -> None:
    while name not in executor.done:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_removal_lets_the_passes_that_others_share_end_first(loaded) -> None:
    trainer, executor = loaded
    await trainer.create_adapter("bob", CONFIG, 0)
    running = [forward_backward(trainer, name) for name in ("alice", "bob")]
    waiting = forward_backward(trainer, "alice", seq_id=2)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await trainer.remove_adapter("alice")
    await asyncio.gather(*running)
    assert executor.done[-1] == "remove_adapter"
    with pytest.raises(ServiceError, match="'alice'"):
        await waiting
    assert [status.info.adapter_id for status in await trainer.list_adapters()] == ["bob"]


async def test_removal_lets_a_comparison_end_first_whose_pass_others_share(loaded) -> None:
    trainer, executor = loaded
    await trainer.create_adapter("bob", CONFIG, 0)
    executor.gates["run_pass"] = asyncio.Event()
    first = forward_backward(trainer, "bob")
    await asyncio.sleep(0.01)

    async def compare() -> None:
        async with trainer.turn("alice", 0):
            await trainer.compute("alice", DATA, Loss.CROSS_ENTROPY, LossConfig(), backward=False)

    comparing = asyncio.create_task(trainer.to_the_end(compare()))
    second = forward_backward(trainer, "bob")
    await asyncio.sleep(0.01)
    removing = asyncio.create_task(trainer.remove_adapter("alice"))
    await asyncio.sleep(0.01)
    executor.gates["run_pass"].set()
    await asyncio.gather(first, comparing, second, removing)


async def test_an_unnumbered_save_says_no_later_operation_than_its_weights_have(loaded) -> None:
    trainer, executor = loaded

    async def step(seq_id: int) -> None:
        async with trainer.turn("alice", seq_id):
            await trainer.optim_step("alice", AdamParams())

    await step(1)
    executor.gates["tensors"] = asyncio.Event()
    saving = save(trainer)
    await asyncio.sleep(0.01)
    following = asyncio.create_task(step(2))
    await asyncio.sleep(0.01)
    executor.gates["tensors"].set()
    await asyncio.gather(saving, following)
    (checkpoint,) = await trainer.list_checkpoints("alice")
    assert (checkpoint.step, checkpoint.seq_id) == (1, 1)


async def test_a_save_under_way_does_not_bring_a_removed_adapter_back(loaded, started) -> None:
    trainer, executor = loaded
    executor.gates["tensors"] = asyncio.Event()
    saving = save(trainer)
    await until_done(executor, "optimizer_state")
    removing = asyncio.create_task(trainer.remove_adapter("alice"))
    await asyncio.sleep(0.01)
    executor.gates["tensors"].set()
    await asyncio.gather(saving, removing)
    again, _ = started()
    await again.load_base_model("model", lambda stage: None)
    assert await again.list_adapters() == []
    assert len(await again.list_checkpoints("alice")) == 1


async def test_what_arrives_while_a_restarted_trainer_loads_waits_for_its_adapter(loaded, started) -> None:
    trainer, _ = loaded
    await save(trainer)
    again, executor = started()
    executor.gates["load_base_model"] = asyncio.Event()
    loading = asyncio.create_task(again.load_base_model("model", lambda stage: None))
    await asyncio.sleep(0)
    early = forward_backward(again, seq_id=1)
    await asyncio.sleep(0.01)
    assert not early.done()
    executor.gates["load_base_model"].set()
    await asyncio.gather(loading, early)
    assert executor.done[-1] == "run_pass"


async def test_an_adapter_of_another_base_model_is_left_out(loaded, started, monkeypatch) -> None:
    await save(loaded[0])
    other = SimpleNamespace(**{**vars(MODEL), "fingerprint": "0" * 64})
    monkeypatch.setattr(trainer_module.checkpoints, "resolve", lambda name: other)
    again, _ = started()
    await again.load_base_model("model", lambda stage: None)
    assert await again.list_adapters() == []
    with pytest.raises(ServiceError) as refusal:
        await again.create_from_checkpoint("alice", "alice/step-0", fresh_optimizer=False)
    assert refusal.value.reason == "BASE_MODEL_MISMATCH"


async def test_a_restart_skips_a_damaged_checkpoint_for_the_one_before(loaded, started, tmp_path) -> None:
    trainer, executor = loaded
    await save(trainer)
    executor.adapters["alice"] = AdapterInfo("alice", CONFIG, 0, 2, 7, True)
    await save(trainer)
    (tmp_path / "alice/step-7/optimizer.safetensors").write_bytes(b"")
    again, _ = started()
    await again.load_base_model("model", lambda stage: None)
    (status,) = await again.list_adapters()
    assert status.info.step == 0


async def test_a_removed_adapter_stays_removed_when_what_was_saved_since_is_damaged(loaded, started, tmp_path) -> None:
    trainer, executor = loaded
    await save(trainer)
    await trainer.remove_adapter("alice")
    await trainer.create_adapter("alice", CONFIG, 0)
    executor.adapters["alice"] = AdapterInfo("alice", CONFIG, 0, 2, 7, True)
    await save(trainer)
    weights = tmp_path / "alice/step-7/adapter_model.safetensors"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    again, _ = started()
    await again.load_base_model("model", lambda stage: None)
    assert await again.list_adapters() == []


async def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(loaded, started, monkeypatch) -> None:
    trainer, executor = loaded
    await save(trainer)
    executor.adapters["alice"] = AdapterInfo("alice", CONFIG, 0, 2, 7, True)
    await save(trainer)
    again, _ = started()

    def fails(*_):
        raise errors.unavailable("CHECKPOINT_FOLDER_UNUSABLE", "no answer")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "load", fails)
        with pytest.raises(ServiceError, match="no answer"):
            await again.load_base_model("model", lambda stage: None)
    await again.load_base_model("model", lambda stage: None)
    (status,) = await again.list_adapters()
    assert status.info.step == 7


async def test_an_adapter_that_this_trainer_refuses_keeps_no_other_from_coming_back(loaded, started) -> None:
    trainer, _ = loaded
    await trainer.create_adapter("bob", CONFIG, 0)
    for name in ("alice", "bob"):
        await save(trainer, name)
    again, executor = started()
    create = executor._create_adapter

    def refuses(adapter_id, *args):
        if adapter_id == "alice":
            raise errors.invalid_argument("RANK_OUT_OF_RANGE", "the rank is too high")
        return create(adapter_id, *args)

    executor._create_adapter = refuses
    await again.load_base_model("model", lambda stage: None)
    assert [status.info.adapter_id for status in await again.list_adapters()] == ["bob"]


async def test_a_checkpoint_whose_time_has_come_is_deleted_by_itself(loaded, tmp_path, monkeypatch) -> None:
    trainer, _ = loaded
    await trainer.close()
    monkeypatch.setattr(trainer_module, "_EXPIRE_SECONDS", 0.02)
    trainer._expiring = None
    await trainer.load_base_model("model", lambda stage: None)
    await save(trainer, ttl_seconds=0.05)
    folder = tmp_path / "alice/step-0"
    assert folder.is_dir()
    async with asyncio.timeout(10):
        while folder.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await trainer.close()


async def test_without_a_folder_there_are_no_checkpoints(loaded) -> None:
    _, executor = loaded
    trainer = Trainer(executor.engine, executor, Metrics())
    with pytest.raises(ServiceError) as refusal:
        await trainer.list_checkpoints("")
    assert refusal.value.reason == "NO_CHECKPOINT_FOLDER"
