"""TrainerService over gRPC: translates, and leaves everything else to the trainer."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from service_common import describe, errors, lora
from tinkerbell import payload, tensors
from tinkerbell.v1 import common_pb2, trainer_pb2, trainer_pb2_grpc
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.engine import Engine, OptimizerState, PassResult
from trainer_service.losses import Loss
from trainer_service.trainer import AdapterStatus, Trainer

_LOSSES = {
    trainer_pb2.LOSS_FUNCTION_UNSPECIFIED: Loss.CROSS_ENTROPY,
    trainer_pb2.LOSS_FUNCTION_CROSS_ENTROPY: Loss.CROSS_ENTROPY,
}
_TRANSPORTS = (trainer_pb2.TRANSPORT_UNSPECIFIED, trainer_pb2.TRANSPORT_GRPC)
_VERSIONED_PACKAGES = ("torch", "megatron-core", "megatron-bridge", "transformers", "transformer-engine")


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """See protos/tinkerbell/v1/trainer.proto."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    async def InitializeBaseModel(self, request, context) -> AsyncIterator[trainer_pb2.InitializeBaseModelResponse]:
        started = time.monotonic()
        stages: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def response(stage: str, **fields) -> trainer_pb2.InitializeBaseModelResponse:
            return trainer_pb2.InitializeBaseModelResponse(
                stage=f"STAGE_{stage}", elapsed_seconds=time.monotonic() - started, **fields
            )

        def report(stage: str) -> None:  # called on the engine's thread
            loop.call_soon_threadsafe(stages.put_nowait, stage)

        loading = asyncio.create_task(self._trainer.load_base_model(request.model, report))
        # A caller that goes away does not stop the load: the next caller finds it done.
        while not loading.done() or not stages.empty():
            next_stage = asyncio.create_task(stages.get())
            await asyncio.wait((next_stage, loading), return_when=asyncio.FIRST_COMPLETED)
            if next_stage.done():
                yield response(next_stage.result())
            else:
                next_stage.cancel()
        await loading
        yield response("READY", base_model=self._base_model())

    async def GetBackendInfo(self, request, context):
        engine = self._trainer.engine
        publisher = self._trainer.publisher
        return trainer_pb2.TrainerServiceGetBackendInfoResponse(
            base_model=self._base_model(),
            device=engine.device.type,
            world_size=1,
            versions=describe.package_versions(_VERSIONED_PACKAGES),
            num_adapters=len(await self._trainer.list_adapters()),
            max_rank=engine.limits.max_rank,
            max_batch_tokens=engine.limits.max_batch_tokens,
            sampler_address=publisher.address if publisher else "",
            target_modules=lora.TARGET_MODULES,
        )

    async def CreateLoraAdapter(self, request, context):
        status = await self._trainer.create_adapter(request.adapter_id, request.lora, request.seed)
        return trainer_pb2.CreateLoraAdapterResponse(adapter=_adapter(status))

    async def ListLoraAdapters(self, request, context):
        adapters = await self._trainer.list_adapters()
        return trainer_pb2.ListLoraAdaptersResponse(adapters=map(_adapter, adapters))

    async def RemoveLoraAdapter(self, request, context):
        await self._trainer.remove_adapter(request.adapter_id)
        return trainer_pb2.RemoveLoraAdapterResponse()

    async def Forward(self, request, context):
        async with self._trainer.turn(request.adapter_id, request.seq_id):
            result = await self._trainer.executor.run(
                Engine.forward, request.adapter_id, _data(request.data), _loss(request.loss)
            )
        return trainer_pb2.ForwardResponse(outputs=_outputs(result), metrics=result.metrics)

    async def ForwardBackward(self, request, context):
        async with self._trainer.turn(request.adapter_id, request.seq_id):
            result = await self._trainer.executor.run(
                Engine.forward_backward, request.adapter_id, _data(request.data), _loss(request.loss)
            )
        return trainer_pb2.ForwardBackwardResponse(outputs=_outputs(result), metrics=result.metrics)

    async def OptimStep(self, request, context):
        async with self._trainer.turn(request.adapter_id, request.seq_id):
            params = AdamParams(**{field.name: value for field, value in request.adam.ListFields()})
            result = await self._trainer.executor.run(Engine.optim_step, request.adapter_id, params)
        return trainer_pb2.OptimStepResponse(step=result.step, grad_norm=result.grad_norm)

    async def GetOptimizerState(self, request, context):
        state = await self._trainer.executor.run(Engine.optimizer_state, request.adapter_id)
        return trainer_pb2.GetOptimizerStateResponse(state=_optimizer_state(state))

    async def ListOptimizerStates(self, request, context):
        states = await self._trainer.executor.run(Engine.optimizer_states)
        return trainer_pb2.ListOptimizerStatesResponse(states=map(_optimizer_state, states))

    async def ExportAdapterWeights(self, request, context) -> AsyncIterator[trainer_pb2.ExportAdapterWeightsResponse]:
        async with self._trainer.turn(request.adapter_id, request.seq_id):
            dtype = request.dtype or common_pb2.DATA_TYPE_FLOAT32
            snapshot = await self._trainer.executor.run(Engine.snapshot, request.adapter_id, dtype)
        yield trainer_pb2.ExportAdapterWeightsResponse(manifest=snapshot.manifest)
        for chunk in payload.chunks(snapshot.payload):
            yield trainer_pb2.ExportAdapterWeightsResponse(chunk=chunk)

    async def SyncAdapter(self, request, context):
        async with self._trainer.turn(request.adapter_id, request.seq_id) as turn:
            if request.transport not in _TRANSPORTS:
                raise errors.invalid_argument(
                    "TRANSPORT_UNKNOWN", f"transport {request.transport} is not a Transport", field="transport"
                )
            sync = await self._trainer.sync(request.adapter_id, turn)
        return trainer_pb2.SyncAdapterResponse(
            version=sync.version,
            digest=sync.digest,
            transport=trainer_pb2.TRANSPORT_GRPC,
            sent_bytes=sync.sent_bytes,
            seconds=sync.seconds,
        )

    def _base_model(self) -> common_pb2.BaseModelInfo | None:
        engine = self._trainer.engine
        if engine.checkpoint is None:
            return None
        return describe.base_model_info(engine.checkpoint, engine.data_type, engine.checkpoint.max_sequence_length)


def _loss(wire: Any) -> Loss:
    try:
        return _LOSSES[wire]
    except KeyError:
        raise errors.invalid_argument(
            "LOSS_UNKNOWN", f"loss {wire} is not a LossFunction; cross_entropy is possible", field="loss"
        ) from None


def _data(wire: Sequence[trainer_pb2.Datum]) -> list[Datum]:
    return [_datum(datum, f"data[{index}]") for index, datum in enumerate(wire)]


def _datum(wire: trainer_pb2.Datum, field: str) -> Datum:
    unknown = sorted(set(wire.loss_inputs) - {"target_tokens", "weights"})
    if unknown or "target_tokens" not in wire.loss_inputs:
        raise errors.invalid_argument(
            "LOSS_INPUTS_INVALID",
            f"cross_entropy takes target_tokens and, if not all ones, weights; {field} has {sorted(wire.loss_inputs)}",
            field=f"{field}.loss_inputs",
        )
    tokens = np.array(wire.tokens, dtype=np.int64)
    targets = _array(wire, "target_tokens", np.signedinteger, field).astype(np.int64)
    if "weights" in wire.loss_inputs:
        weights = _array(wire, "weights", np.float32, field)
    else:
        weights = np.ones(len(tokens), np.float32)
    return Datum(tokens, targets, weights)


def _array(wire: trainer_pb2.Datum, name: str, kind: type, field: str) -> np.ndarray:
    path = f"{field}.loss_inputs[{name}]"
    try:
        array = tensors.decode(wire.loss_inputs[name])
    except ValueError as cause:
        raise errors.invalid_argument("TENSOR_INVALID", f"{path}: {cause}", field=path) from cause
    if not np.issubdtype(array.dtype, kind):
        raise errors.invalid_argument(
            "DATA_TYPE_UNSUPPORTED", f"{path} has dtype {array.dtype} and must be {kind.__name__}", field=path
        )
    return array


def _outputs(result: PassResult) -> list[trainer_pb2.DatumOutput]:
    return [trainer_pb2.DatumOutput(logprobs=tensors.encode(logprobs)) for logprobs in result.logprobs]


def _adapter(status: AdapterStatus) -> trainer_pb2.LoraAdapter:
    adapter = status.adapter
    return trainer_pb2.LoraAdapter(
        adapter_id=adapter.adapter_id,
        lora=adapter.config,
        seed=adapter.seed,
        num_parameters=adapter.arena.num_parameters,
        step=adapter.step,
        published_version=status.published_version,
        next_seq_id=status.next_seq_id,
    )


def _optimizer_state(state: OptimizerState) -> trainer_pb2.OptimizerState:
    return trainer_pb2.OptimizerState(
        adapter_id=state.adapter_id,
        step=state.step,
        last_adam=trainer_pb2.AdamParams(**vars(state.last_adam)) if state.last_adam else None,
        accumulated_calls=state.accumulated_calls,
        size_bytes=state.size_bytes,
        tensors=[trainer_pb2.TensorMoments(**vars(moments)) for moments in state.tensors],
    )
