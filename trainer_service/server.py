"""TrainerService over gRPC: translates, and leaves everything else to the trainer."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from service_common import describe, errors, lora
from tinkerbell import payload, tensors
from tinkerbell.v1 import common_pb2, trainer_pb2, trainer_pb2_grpc
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.batching import Computed
from trainer_service.checkpoints import CheckpointInfo
from trainer_service.engine import Engine, OptimizerState, Tensors
from trainer_service.losses import DEFAULTS, INPUT_DEFAULTS, INPUTS, Loss, LossConfig
from trainer_service.publish.parity import Difference
from trainer_service.publish.transaction import ReplicaOutcome, Transport
from trainer_service.ranks import Process
from trainer_service.snapshot import Snapshot
from trainer_service.trainer import AdapterStatus, Trainer, Verification

_LOSSES = {
    trainer_pb2.LOSS_FUNCTION_UNSPECIFIED: Loss.CROSS_ENTROPY,
    **{trainer_pb2.LossFunction.Value(f"LOSS_FUNCTION_{loss.name}"): loss for loss in Loss},
}
_TRANSPORTS = {trainer_pb2.Transport.Value(f"TRANSPORT_{each.name}"): each for each in Transport}
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
        adapters = await self._trainer.list_adapters()
        return trainer_pb2.TrainerServiceGetBackendInfoResponse(
            base_model=self._base_model(),
            device=engine.device.type,
            parallelism=_parallelism(engine),
            versions=describe.package_versions(_VERSIONED_PACKAGES),
            num_adapters=len(adapters),
            num_resident_adapters=sum(status.info.resident for status in adapters),
            max_adapters=engine.limits.max_adapters,
            max_resident_adapters=engine.limits.max_resident_adapters,
            max_rank=engine.limits.max_rank,
            max_batch_tokens=engine.limits.max_batch_tokens,
            sampler_addresses=publisher.addresses if publisher else (),
            target_modules=lora.adaptable_modules(engine.checkpoint) if engine.checkpoint else (),
        )

    async def CreateLoraAdapter(self, request, context):
        async def create():
            if not request.from_checkpoint:
                status = await self._trainer.create_adapter(request.adapter_id, request.lora, request.seed)
            elif request.HasField("lora"):
                raise errors.invalid_argument(
                    "LORA_GIVEN_TWICE", "from_checkpoint brings its own shape; leave lora out", field="lora"
                )
            else:
                status = await self._trainer.create_from_checkpoint(
                    request.adapter_id, request.from_checkpoint, fresh_optimizer=request.fresh_optimizer
                )
            return trainer_pb2.CreateLoraAdapterResponse(adapter=_adapter(status))

        return await self._trainer.once("", request, create)

    async def ListLoraAdapters(self, request, context):
        adapters = await self._trainer.list_adapters()
        return trainer_pb2.ListLoraAdaptersResponse(adapters=map(_adapter, adapters))

    async def RemoveLoraAdapter(self, request, context):
        async def remove():
            await self._trainer.remove_adapter(request.adapter_id)
            return trainer_pb2.RemoveLoraAdapterResponse()

        return await self._trainer.once("", request, remove)

    async def ImportAdapterWeights(self, requests, context):
        frames = aiter(requests)
        begin = await _begin_of_import(frames)
        manifest = begin.manifest
        lora.check_adapter_id(begin.adapter_id)
        self._trainer.check_import(manifest)
        buffer = bytearray(manifest.size_bytes)
        receiver = payload.Receiver(manifest, buffer)
        try:
            async for frame in frames:
                if frame.HasField("commit"):
                    break
                receiver.add(frame.chunk)
            else:
                raise errors.aborted("IMPORT_NOT_COMMITTED", "the stream ended without COMMIT; nothing was imported")
            await asyncio.to_thread(receiver.finish)
        except payload.PayloadError as damage:
            raise errors.data_loss("PAYLOAD_DAMAGED", f"{damage}; nothing was imported") from damage

        async def replace():
            view = memoryview(buffer)
            weights = {
                spec.name: tensors.decode_bytes(
                    view[spec.offset : spec.offset + spec.size_bytes], spec.dtype, spec.shape
                ).astype(np.float32)
                for spec in manifest.tensors
            }
            _check_finite(weights)
            config = lora.normalized(manifest.lora, self._trainer.engine.limits.max_rank)
            status = await self._trainer.import_weights(begin.adapter_id, begin.seq_id, config, Tensors(weights))
            return trainer_pb2.ImportAdapterWeightsResponse(adapter=_adapter(status))

        return await self._trainer.once("", begin, replace)

    async def Forward(self, request, context):
        async def compute():
            result = await self._compute(request, backward=False)
            return trainer_pb2.ForwardResponse(outputs=_outputs(result), metrics=result.metrics)

        return await self._trainer.once(request.adapter_id, request, compute)

    async def ForwardBackward(self, request, context):
        async def compute():
            result = await self._compute(request, backward=True)
            return trainer_pb2.ForwardBackwardResponse(outputs=_outputs(result), metrics=result.metrics)

        return await self._trainer.once(request.adapter_id, request, compute)

    async def OptimStep(self, request, context):
        async def step():
            async with self._trainer.turn(request.adapter_id, request.seq_id):
                params = AdamParams(**_given(request.adam))
                result = await self._trainer.optim_step(request.adapter_id, params)
            return trainer_pb2.OptimStepResponse(step=result.step, grad_norm=result.grad_norm)

        return await self._trainer.once(request.adapter_id, request, step)

    async def GetOptimizerState(self, request, context):
        state = await self._trainer.optimizer_state(request.adapter_id)
        return trainer_pb2.GetOptimizerStateResponse(state=_optimizer_state(state))

    async def ListOptimizerStates(self, request, context):
        states = await self._trainer.optimizer_states()
        return trainer_pb2.ListOptimizerStatesResponse(states=map(_optimizer_state, states))

    async def ExportOptimizerState(self, request, context) -> AsyncIterator[trainer_pb2.ExportOptimizerStateResponse]:
        async def copy() -> tuple[OptimizerState, tuple[Snapshot, Snapshot]]:
            async with self._trainer.turn(request.adapter_id, request.seq_id, alone=True):
                state = await self._trainer.optimizer_state(request.adapter_id)
                return state, await self._trainer.moments(request.adapter_id)

        state, (first, second) = await self._trainer.to_the_end(copy())
        yield trainer_pb2.ExportOptimizerStateResponse(state=_optimizer_state(state))
        yield trainer_pb2.ExportOptimizerStateResponse(first_moment=first.manifest)
        for chunk in payload.chunks(first.payload):
            yield trainer_pb2.ExportOptimizerStateResponse(chunk=chunk)
        yield trainer_pb2.ExportOptimizerStateResponse(second_moment=second.manifest)
        for chunk in payload.chunks(second.payload):
            yield trainer_pb2.ExportOptimizerStateResponse(chunk=chunk)

    async def ExportAdapterWeights(self, request, context) -> AsyncIterator[trainer_pb2.ExportAdapterWeightsResponse]:
        async def copy() -> Snapshot:
            async with self._trainer.turn(request.adapter_id, request.seq_id):
                dtype = request.dtype or common_pb2.DATA_TYPE_FLOAT32
                return await self._trainer.snapshot(request.adapter_id, dtype)

        snapshot = await self._trainer.to_the_end(copy())
        yield trainer_pb2.ExportAdapterWeightsResponse(manifest=snapshot.manifest)
        for chunk in payload.chunks(snapshot.payload):
            yield trainer_pb2.ExportAdapterWeightsResponse(chunk=chunk)

    async def SyncAdapter(self, request, context):
        async def publish():
            started = time.monotonic()
            async with self._trainer.turn(request.adapter_id, request.seq_id, alone=True) as turn:
                if request.transport not in _TRANSPORTS:
                    raise errors.invalid_argument(
                        "TRANSPORT_UNKNOWN", f"transport {request.transport} is not a Transport", field="transport"
                    )
                verify = _verification(request.verify) if request.HasField("verify") else None
                published = await self._trainer.sync(request.adapter_id, turn, verify, _TRANSPORTS[request.transport])
            return trainer_pb2.SyncAdapterResponse(
                version=published.version,
                digest=published.digest,
                transport=f"TRANSPORT_{published.transport.name}",
                sent_bytes=published.sent_bytes,
                seconds=time.monotonic() - started,
                replicas=[_replica_publication(outcome) for outcome in published.replicas],
            )

        return await self._trainer.once(request.adapter_id, request, publish)

    async def VerifyAdapter(self, request, context):
        async def compare():
            async with self._trainer.turn(request.adapter_id, 0):
                return await self._trainer.verify(request.adapter_id, _verification(request.verify))

        current, steps_since, comparisons = await self._trainer.to_the_end(compare())
        response = trainer_pb2.VerifyAdapterResponse(
            version=current.version, digest=current.digest, steps_since=steps_since
        )
        for comparison in comparisons:
            replica = response.replicas.add(address=comparison.address, error=comparison.error)
            if comparison.difference:
                replica.difference.CopyFrom(_logprob_difference(comparison.difference))
                replica.agrees = comparison.difference.agrees
        return response

    async def SaveCheckpoint(self, request, context):
        async def save():
            async with self._trainer.turn(request.adapter_id, request.seq_id, alone=True) as turn:
                info = await self._trainer.save_checkpoint(request.adapter_id, request.name, request.ttl_seconds, turn)
            return trainer_pb2.SaveCheckpointResponse(checkpoint=_checkpoint(info))

        return await self._trainer.once(request.adapter_id, request, save)

    async def LoadCheckpoint(self, request, context):
        async def load():
            async with self._trainer.turn(request.adapter_id, request.seq_id, alone=True):
                status = await self._trainer.load_checkpoint(
                    request.adapter_id, request.checkpoint_id, fresh_optimizer=request.fresh_optimizer
                )
            return trainer_pb2.LoadCheckpointResponse(adapter=_adapter(status))

        return await self._trainer.once(request.adapter_id, request, load)

    async def ListCheckpoints(self, request, context):
        infos = await self._trainer.list_checkpoints(request.adapter_id)
        return trainer_pb2.ListCheckpointsResponse(checkpoints=map(_checkpoint, infos))

    async def DeleteCheckpoint(self, request, context):
        async def delete():
            await self._trainer.delete_checkpoint(request.checkpoint_id)
            return trainer_pb2.DeleteCheckpointResponse()

        return await self._trainer.once("", request, delete)

    async def _compute(self, request: Any, *, backward: bool) -> Computed:
        async with self._trainer.turn(request.adapter_id, request.seq_id):
            loss = _loss(request.loss)
            config = dataclasses.replace(DEFAULTS.get(loss, LossConfig()), **_given(request.loss_config))
            data = [_datum(datum, loss, f"data[{index}]") for index, datum in enumerate(request.data)]
            return await self._trainer.compute(request.adapter_id, data, loss, config, backward=backward)

    def _base_model(self) -> common_pb2.BaseModelInfo | None:
        engine = self._trainer.engine
        if engine.checkpoint is None:
            return None
        return describe.base_model_info(engine.checkpoint, engine.data_type, engine.checkpoint.max_sequence_length)


async def _begin_of_import(frames: AsyncIterator[Any]) -> trainer_pb2.ImportBegin:
    first = await anext(frames, None)
    if first is None or not first.HasField("begin"):
        raise errors.invalid_argument("FRAME_UNEXPECTED", "an import begins with BEGIN", field="begin")
    return first.begin


def _check_finite(weights: dict[str, np.ndarray]) -> None:
    for name, tensor in weights.items():
        if not np.isfinite(tensor).all():
            raise errors.invalid_argument(
                "TENSOR_NOT_FINITE", f"tensor {name!r} holds NaN or infinity", field="manifest.tensors", tensor=name
            )


def _given(wire: Any) -> dict[str, Any]:
    """The fields that the client has set."""
    return {field.name: value for field, value in wire.ListFields()}


def _loss(wire: Any) -> Loss:
    try:
        return _LOSSES[wire]
    except KeyError:
        raise errors.invalid_argument("LOSS_UNKNOWN", f"loss {wire} is not a LossFunction", field="loss") from None


def _datum(wire: trainer_pb2.Datum, loss: Loss, field: str) -> Datum:
    if "target_tokens" not in wire.loss_inputs:
        raise errors.invalid_argument(
            "LOSS_INPUTS_INVALID",
            f"{loss.value} takes target_tokens; {field} has {sorted(wire.loss_inputs)}",
            field=f"{field}.loss_inputs",
            loss=loss.value,
        )
    tokens = np.array(wire.tokens, dtype=np.int64)
    targets = _array(wire, "target_tokens", np.signedinteger, field).astype(np.int64)
    inputs = {
        name: np.full(len(tokens), default, np.float32)
        for name, default in INPUT_DEFAULTS.items()
        if name in INPUTS[loss]
    }
    for name in wire.loss_inputs:
        if name != "target_tokens":
            inputs[name] = _array(wire, name, np.float32, field)
    return Datum(tokens, targets, inputs)


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


def _outputs(result: Computed) -> list[trainer_pb2.DatumOutput]:
    return [trainer_pb2.DatumOutput(logprobs=tensors.encode(logprobs)) for logprobs in result.logprobs]


def _parallelism(engine: Engine) -> trainer_pb2.Parallelism:
    world_size = Process.from_environment().world_size
    layout = engine.layout
    return trainer_pb2.Parallelism(
        world_size=world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data(world_size),
        sequence_parallel=layout.sequence_parallel,
    )


def _adapter(status: AdapterStatus) -> trainer_pb2.LoraAdapter:
    info = status.info
    return trainer_pb2.LoraAdapter(
        adapter_id=info.adapter_id,
        lora=info.config,
        seed=info.seed,
        num_parameters=info.num_parameters,
        step=info.step,
        published_version=status.published_version,
        next_seq_id=status.next_seq_id,
        resident=info.resident,
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


def _checkpoint(info: CheckpointInfo) -> trainer_pb2.Checkpoint:
    return trainer_pb2.Checkpoint(**{**vars(info), "path": str(info.path)})


def _verification(verify: trainer_pb2.Verification) -> Verification:
    tolerance = verify.tolerance if verify.HasField("tolerance") else None
    return Verification([sequence.tokens for sequence in verify.sequences], tolerance)


def _replica_publication(outcome: ReplicaOutcome) -> trainer_pb2.ReplicaPublication:
    return trainer_pb2.ReplicaPublication(
        address=outcome.address,
        state=f"REPLICA_STATE_{outcome.state.name}",
        sent_bytes=outcome.sent_bytes,
        seconds=outcome.seconds,
        error=outcome.error,
        difference=_logprob_difference(outcome.difference) if outcome.difference else None,
        transport=f"TRANSPORT_{outcome.transport.name}",
        no_cuda_ipc=outcome.no_cuda_ipc,
    )


def _logprob_difference(difference: Difference) -> trainer_pb2.LogprobDifference:
    return trainer_pb2.LogprobDifference(mean=difference.mean, max=difference.max, tokens=difference.tokens)
