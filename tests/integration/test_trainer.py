"""The trainer as a client sees it: one real process, SmolLM2, Megatron on whatever the host has."""

import asyncio
import copy
import math
import uuid
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from processes import health, start_trainer

from tinkerbell import AsyncTrainerClient, Datum, FailedPreconditionError, NotFoundError, tensors
from tinkerbell.v1 import common_pb2, trainer_pb2, trainer_pb2_grpc

pytestmark = pytest.mark.engine

DATUM = Datum(tokens=[1, 2, 3, 4], target_tokens=[2, 3, 4, 5])


def fresh_id() -> str:
    return f"t-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
async def client(trainer_process):
    async with AsyncTrainerClient(trainer_process.address) as connected:
        yield connected


@pytest.fixture(scope="session")
async def stub(trainer_process):
    async with grpc.aio.insecure_channel(trainer_process.address) as channel:
        yield trainer_pb2_grpc.TrainerServiceStub(channel)


@pytest.fixture
async def run(client):
    created = await client.create_lora_adapter(fresh_id(), rank=4, target_modules=["q_proj", "down_proj"])
    yield created
    await created.remove()


async def test_backend_info_describes_the_model(client, smollm2) -> None:
    info = await client.get_backend_info()
    assert info.base_model.architecture == "LlamaForCausalLM"
    assert info.base_model.vocab_size == 49152
    assert info.base_model.num_parameters == 134_515_008
    assert info.versions["megatron-core"] == "0.19.2"
    assert info.device == "cpu"


async def test_a_new_adapter_computes_what_the_base_computes_and_a_stepped_one_does_not(client, run) -> None:
    base = (await client.forward([DATUM])).logprobs[0]
    assert np.allclose((await run.forward([DATUM])).logprobs[0], base, atol=1e-5)
    await run.forward_backward([DATUM])
    step = await run.optim_step(learning_rate=1e-2)
    assert step.step == 1
    assert step.grad_norm > 0
    assert np.abs((await run.forward([DATUM])).logprobs[0] - base).max() > 1e-2
    assert np.allclose((await client.forward([DATUM])).logprobs[0], base, atol=1e-6)


async def test_pipelined_operations_keep_their_order(client, run) -> None:
    calls = []
    for _ in range(4):
        calls += [run.forward_backward([DATUM]), run.optim_step(learning_rate=1e-3)]
    answers = await asyncio.gather(*calls)
    losses = [answer.loss for answer in answers[0::2]]
    assert losses == sorted(losses, reverse=True)
    assert [answer.step for answer in answers[1::2]] == [1, 2, 3, 4]
    assert (await client.training_run(run.adapter_id)).adapter.next_seq_id == 9


async def test_tenants_do_not_touch_each_other(client, run) -> None:
    other = await client.create_lora_adapter(fresh_id(), rank=2, alpha=8.0, seed=3)
    before = await other.export_adapter_weights(as_dict=True)
    await run.forward_backward([DATUM])
    await run.optim_step(learning_rate=1e-2)
    after = await other.export_adapter_weights(as_dict=True)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(FailedPreconditionError, match="no gradient"):
        await other.optim_step()
    await other.remove()


async def test_seed_decides_the_weights(client) -> None:
    weights = []
    for seed in (5, 5, 6):
        created = await client.create_lora_adapter(fresh_id(), rank=2, target_modules=["v_proj"], seed=seed)
        weights.append(await created.export_adapter_weights(as_dict=True))
        await created.remove()
    (name, first), *_ = weights[0].items()
    assert name == "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    assert np.array_equal(first, weights[1][name])
    assert not np.array_equal(first, weights[2][name])
    assert np.abs(first).max() <= 1 / math.sqrt(576)


async def test_bfloat16_export_is_the_rounded_float32_export(run) -> None:
    exact = await run.export_adapter_weights(as_dict=True)
    rounded = await run.export_adapter_weights(as_dict=True, dtype="bfloat16")
    for name, array in exact.items():
        assert np.allclose(rounded[name], array, rtol=2**-8, atol=0)


async def test_optimizer_state_follows_the_steps(client, run) -> None:
    await run.forward_backward([DATUM])
    pending = await run.get_optimizer_state()
    assert (pending.step, pending.accumulated_calls, pending.last_adam) == (0, 1, None)
    await run.optim_step(learning_rate=2e-3)
    state = await run.get_optimizer_state()
    assert (state.step, state.accumulated_calls) == (1, 0)
    assert state.last_adam.learning_rate == 2e-3
    assert len(state.tensors) == 30 * 2 * 2
    assert any(tensor.exp_avg_norm > 0 for tensor in state.tensors)
    assert run.adapter_id in [listed.adapter_id for listed in await client.list_optimizer_states()]


async def test_the_same_model_again_is_ready_at_once_and_another_is_refused(client, smollm2, tiny_model) -> None:
    stages = []
    await client.initialize_base_model(str(smollm2), on_progress=lambda progress: stages.append(progress.stage))
    assert stages[-1].lower().endswith("ready")
    with pytest.raises(FailedPreconditionError) as refusal:
        await client.initialize_base_model(str(tiny_model))
    assert refusal.value.reason == "BASE_MODEL_LOADED"
    with pytest.raises(NotFoundError) as refusal:
        await client.initialize_base_model("no/such-model")
    assert refusal.value.reason == "MODEL_NOT_FOUND"


def wire_datum(tokens: list[int], targets: list[int] | None = None, **loss_inputs) -> trainer_pb2.Datum:
    arrays = {"target_tokens": np.array(tokens if targets is None else targets, np.int64), **loss_inputs}
    return trainer_pb2.Datum(tokens=tokens, loss_inputs={name: tensors.encode(array) for name, array in arrays.items()})


def forward(*data: trainer_pb2.Datum, **fields) -> trainer_pb2.ForwardBackwardRequest:
    return trainer_pb2.ForwardBackwardRequest(data=data, **fields)


def damaged_tensor() -> trainer_pb2.Datum:
    datum = wire_datum([1, 2])
    datum.loss_inputs["target_tokens"].data = b"\0"
    return datum


def step(**adam) -> trainer_pb2.OptimStepRequest:
    return trainer_pb2.OptimStepRequest(adam=trainer_pb2.AdamParams(**adam))


def create(adapter_id: str = "x", **lora) -> trainer_pb2.CreateLoraAdapterRequest:
    return trainer_pb2.CreateLoraAdapterRequest(
        adapter_id=adapter_id, lora=common_pb2.LoraConfig(**{"rank": 4, **lora})
    )


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
# (method, request without adapter_id, code, reason, what the message names)
REFUSED: list[tuple[str, Any, grpc.StatusCode, str, str]] = [
    ("ForwardBackward", forward(), INVALID, "BATCH_EMPTY", "data"),
    ("ForwardBackward", forward(wire_datum([1, 49152])), INVALID, "TOKEN_OUT_OF_RANGE", "49152"),
    ("ForwardBackward", forward(wire_datum([1, -1])), INVALID, "TOKEN_OUT_OF_RANGE", "-1"),
    ("ForwardBackward", forward(wire_datum([1, 2], [1])), INVALID, "LENGTH_MISMATCH", "target_tokens"),
    (
        "ForwardBackward",
        forward(wire_datum([1, 2], weights=np.array([1, np.nan], np.float32))),
        INVALID,
        "WEIGHT_NOT_FINITE",
        "weights[1]",
    ),
    (
        "ForwardBackward",
        forward(wire_datum([1, 2], weights=np.ones(2, np.int64))),
        INVALID,
        "DATA_TYPE_UNSUPPORTED",
        "weights",
    ),
    ("ForwardBackward", forward(damaged_tensor()), INVALID, "TENSOR_INVALID", "16 bytes"),
    ("ForwardBackward", forward(trainer_pb2.Datum(tokens=[1])), INVALID, "LOSS_INPUTS_INVALID", "target_tokens"),
    ("ForwardBackward", forward(wire_datum([1]), loss=99), INVALID, "LOSS_UNKNOWN", "99"),
    ("OptimStep", step(learning_rate=math.nan), INVALID, "ADAM_PARAM_OUT_OF_RANGE", "learning_rate"),
    ("OptimStep", step(beta2=1.0), INVALID, "ADAM_PARAM_OUT_OF_RANGE", "beta2"),
    ("OptimStep", step(), grpc.StatusCode.FAILED_PRECONDITION, "NO_GRADIENT", "ForwardBackward"),
    ("SyncAdapter", trainer_pb2.SyncAdapterRequest(transport=77), INVALID, "TRANSPORT_UNKNOWN", "77"),
    (
        "ExportAdapterWeights",
        trainer_pb2.ExportAdapterWeightsRequest(dtype=common_pb2.DATA_TYPE_INT64),
        INVALID,
        "DATA_TYPE_UNSUPPORTED",
        "dtype",
    ),
    ("CreateLoraAdapter", create("../up"), INVALID, "ADAPTER_ID_INVALID", "../up"),
    ("CreateLoraAdapter", create(rank=65), INVALID, "RANK_OUT_OF_RANGE", "64"),
    ("CreateLoraAdapter", create(rank=0), INVALID, "RANK_OUT_OF_RANGE", "0"),
    ("CreateLoraAdapter", create(alpha=math.inf), INVALID, "ALPHA_OUT_OF_RANGE", "inf"),
    ("CreateLoraAdapter", create(target_modules=["lm_head"]), INVALID, "TARGET_MODULE_UNKNOWN", "lm_head"),
    ("GetOptimizerState", trainer_pb2.GetOptimizerStateRequest(adapter_id="bob"), MISSING, "ADAPTER_NOT_FOUND", "bob"),
    ("RemoveLoraAdapter", trainer_pb2.RemoveLoraAdapterRequest(adapter_id="bob"), MISSING, "ADAPTER_NOT_FOUND", "bob"),
    ("ForwardBackward", forward(wire_datum([1]), adapter_id="bob"), MISSING, "ADAPTER_NOT_FOUND", "bob"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "message", "code", "reason", "named"), REFUSED)
async def test_bad_input_is_refused_and_changes_nothing(stub, run, method, message, code, reason, named) -> None:
    request = copy.deepcopy(message)
    if not request.adapter_id:
        request.adapter_id = run.adapter_id
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        call = getattr(stub, method)(request)
        await (call.read() if method == "ExportAdapterWeights" else call)
    assert failure.value.code() is code
    assert named in failure.value.details()
    status = rpc_status.from_call(failure.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("tinkerbell", reason)
    state = await run.get_optimizer_state()
    assert (state.step, state.accumulated_calls) == (0, 0)


async def test_a_name_that_is_taken_is_refused(stub, run) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.CreateLoraAdapter(create(run.adapter_id))
    assert failure.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_reflection_lists_the_service(trainer_process) -> None:
    async with grpc.aio.insecure_channel(trainer_process.address) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in reflection.ServerReflectionInfo(iter([question]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"tinkerbell.v1.TrainerService", "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} <= names


async def test_an_empty_trainer_loads_on_request_and_drains_on_sigterm(tiny_model) -> None:
    service = start_trainer("--device", "cpu")
    try:
        async with asyncio.timeout(60):
            while await asyncio.to_thread(health, service, "") != health_pb2.HealthCheckResponse.SERVING:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert health(service, service.health_name) == health_pb2.HealthCheckResponse.NOT_SERVING
        async with AsyncTrainerClient(service.address) as client:
            with pytest.raises(FailedPreconditionError) as refusal:
                await client.create_lora_adapter("early", rank=4)
            assert refusal.value.reason == "NO_BASE_MODEL"
            stages: list[str] = []
            await client.initialize_base_model(str(tiny_model), lambda progress: stages.append(progress.stage))
            assert [stage.upper().removeprefix("STAGE_") for stage in stages] == [
                "RESOLVING", "BUILDING", "LOADING", "VERIFYING", "READY"
            ]  # fmt: skip
            assert health(service, service.health_name) == health_pb2.HealthCheckResponse.SERVING
            run = await client.create_lora_adapter("drained", rank=4)
            with pytest.raises(FailedPreconditionError) as refusal:
                await run.sync_adapter_to_vllm()
            assert refusal.value.reason == "NO_SAMPLER"
            data = [Datum(tokens=list(range(100)), target_tokens=list(range(100)))] * 20
            running = run.forward_backward(data)
            await asyncio.sleep(0.1)
            service.process.terminate()
            assert len((await running).logprobs) == 20
        assert await asyncio.to_thread(service.process.wait, 40) == 0
        assert not psutil.pid_exists(service.process.pid)
    finally:
        service.process.kill()


async def test_sigterm_does_not_wait_for_a_model_that_is_loading(tiny_model) -> None:
    service = start_trainer("--model", str(tiny_model), "--device", "cpu")
    try:
        async with asyncio.timeout(60):
            while await asyncio.to_thread(health, service, "") != health_pb2.HealthCheckResponse.SERVING:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        service.process.terminate()
        # Importing Megatron alone takes longer than this.
        assert await asyncio.to_thread(service.process.wait, 5) == 0
    finally:
        service.process.kill()
