"""The trainer's client for asyncio."""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from tinkerbell import _decode, adapter, custom_loss, imports, peft_folder, results, tensors
from tinkerbell._connection import Connection, T
from tinkerbell._order import OperationOrder
from tinkerbell._retry import DEFAULT_RETRY, Retry, new_request_id
from tinkerbell.custom_loss import CustomLoss
from tinkerbell.errors import InternalError, NotFoundError, TinkerbellError
from tinkerbell.inputs import (
    AdamParams,
    Datum,
    Loss,
    LossConfig,
    Transport,
    Verification,
    loss_function,
    transport_to_proto,
)
from tinkerbell.lora import LoraConfig
from tinkerbell.v1 import common_pb2, trainer_pb2, trainer_pb2_grpc

NamedArrays = AsyncGenerator[tuple[str, np.ndarray], None]


class AsyncTrainerClient:
    """A connection to a trainer; see `tinkerbell.TrainerClient`."""

    def __init__(self, address: str, timeout: float | None = None, retry: Retry = DEFAULT_RETRY):
        """See `TrainerClient`."""
        self._connection = Connection("the trainer", address, timeout, retry)
        self._stub = trainer_pb2_grpc.TrainerServiceStub(self._connection.channel)

    async def __aenter__(self) -> "AsyncTrainerClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See `TrainerClient.close`."""
        await self._connection.close()

    async def initialize_base_model(
        self, model: str, on_progress: Callable[[results.LoadProgress], None] | None = None
    ) -> results.BaseModelInfo:
        """See `TrainerClient.initialize_base_model`."""
        progress = None
        async for progress in self._load_base_model(model):
            if on_progress:
                on_progress(progress)
        return _decode.loaded_model(progress)

    async def get_backend_info(self) -> results.TrainerInfo:
        """See `TrainerClient.get_backend_info`."""
        request = trainer_pb2.TrainerServiceGetBackendInfoRequest()
        return _decode.trainer_info(await self._connection.call(self._stub.GetBackendInfo, request))

    async def create_lora_adapter(
        self,
        adapter_id: str,
        rank: int | None = None,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int = 0,
        use_rslora: bool = False,
        *,
        from_checkpoint: str = "",
        fresh_optimizer: bool = False,
    ) -> "AsyncTrainingRun":
        """See `TrainerClient.create_lora_adapter`."""
        lora = None
        if not from_checkpoint:
            lora = common_pb2.LoraConfig(
                rank=32 if rank is None else rank, alpha=alpha, target_modules=target_modules, use_rslora=use_rslora
            )
        elif rank is not None or alpha is not None or target_modules is not None or use_rslora or seed:
            raise ValueError("a checkpoint brings the adapter's shape and its values; leave the other arguments out")
        request = trainer_pb2.CreateLoraAdapterRequest(
            adapter_id=adapter_id,
            lora=lora,
            seed=seed,
            request_id=new_request_id(),
            from_checkpoint=from_checkpoint,
            fresh_optimizer=fresh_optimizer,
        )
        response = await self._connection.mutate(self._stub.CreateLoraAdapter, request)
        return AsyncTrainingRun(self, _decode.lora_adapter(response.adapter))

    async def import_adapter_weights(
        self,
        adapter_id: str,
        weights: imports.Weights,
        rank: int | None = None,
        alpha: float | None = None,
        use_rslora: bool | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
    ) -> "AsyncTrainingRun":
        """See `TrainerClient.import_adapter_weights`."""
        lora, arrays = await asyncio.to_thread(
            imports.read, weights, rank, alpha, use_rslora, rank_pattern, alpha_pattern
        )
        begin = trainer_pb2.ImportBegin(adapter_id=adapter_id, request_id=new_request_id())
        return AsyncTrainingRun(self, await self._import(begin, lora, arrays))

    async def training_run(self, adapter_id: str) -> "AsyncTrainingRun":
        """See `TrainerClient.training_run`."""
        for known in await self.list_lora_adapters():
            if known.adapter_id == adapter_id:
                return AsyncTrainingRun(self, known)
        raise NotFoundError(
            f"the trainer has no adapter {adapter_id!r}; create_lora_adapter makes one",
            reason="ADAPTER_NOT_FOUND",
            metadata={"adapter_id": adapter_id},
        )

    async def list_lora_adapters(self) -> list[results.LoraAdapter]:
        """See `TrainerClient.list_lora_adapters`."""
        response = await self._connection.call(self._stub.ListLoraAdapters, trainer_pb2.ListLoraAdaptersRequest())
        return [_decode.lora_adapter(known) for known in response.adapters]

    async def remove_lora_adapter(self, adapter_id: str) -> None:
        """See `TrainerClient.remove_lora_adapter`."""
        request = trainer_pb2.RemoveLoraAdapterRequest(adapter_id=adapter_id, request_id=new_request_id())
        await self._connection.mutate(self._stub.RemoveLoraAdapter, request)

    async def list_checkpoints(self, adapter_id: str = "") -> list[results.Checkpoint]:
        """See `TrainerClient.list_checkpoints`."""
        request = trainer_pb2.ListCheckpointsRequest(adapter_id=adapter_id)
        response = await self._connection.call(self._stub.ListCheckpoints, request)
        return [_decode.checkpoint(known) for known in response.checkpoints]

    async def delete_checkpoint(self, checkpoint_id: str) -> None:
        """See `TrainerClient.delete_checkpoint`."""
        request = trainer_pb2.DeleteCheckpointRequest(checkpoint_id=checkpoint_id, request_id=new_request_id())
        await self._connection.mutate(self._stub.DeleteCheckpoint, request)

    async def get_optimizer_state(self, adapter_id: str) -> results.OptimizerState:
        """See `TrainerClient.get_optimizer_state`."""
        request = trainer_pb2.GetOptimizerStateRequest(adapter_id=adapter_id)
        response = await self._connection.call(self._stub.GetOptimizerState, request)
        return _decode.optimizer_state(response.state)

    async def list_optimizer_states(self) -> list[results.OptimizerState]:
        """See `TrainerClient.list_optimizer_states`."""
        request = trainer_pb2.ListOptimizerStatesRequest()
        response = await self._connection.call(self._stub.ListOptimizerStates, request)
        return [_decode.optimizer_state(state) for state in response.states]

    async def export_optimizer_state(self, adapter_id: str) -> results.ExportedOptimizer:
        """See `TrainerClient.export_optimizer_state`."""
        return await self._export_optimizer(trainer_pb2.ExportOptimizerStateRequest(adapter_id=adapter_id))

    def forward(
        self,
        data: Sequence[Datum],
        adapter_id: str = "",
        loss: Loss = "cross_entropy",
        loss_config: LossConfig | None = None,
        **overrides: float,
    ) -> asyncio.Future[results.ForwardResult]:
        """See `TrainerClient.forward`."""
        return self._connection.start(self._forward(forward_request(adapter_id, data, loss, loss_config, overrides)))

    def sync_adapter_to_vllm(
        self, adapter_id: str, verify: Verification | bool = False, transport: Transport = "auto"
    ) -> asyncio.Future[results.SyncResult]:
        """See `TrainerClient.sync_adapter_to_vllm`."""
        return self._connection.start(self._sync_adapter_to_vllm(adapter_id, verify, transport))

    def verify_adapter(
        self, adapter_id: str, verification: Verification | None = None
    ) -> asyncio.Future[results.VerifyResult]:
        """See `TrainerClient.verify_adapter`."""
        return self._connection.start(self._verify_adapter(adapter_id, verification))

    async def export_peft_folder(self, adapter_id: str, folder: str | os.PathLike[str]) -> None:
        """See `TrainerClient.export_peft_folder`."""
        await self._write_peft_folder(await self._open_export(export_request(adapter_id, "float32")), folder)

    @overload
    def export_adapter_weights(
        self, adapter_id: str, as_dict: Literal[False] = False, dtype: str = "float32"
    ) -> AsyncIterator[tuple[str, np.ndarray]]: ...
    @overload
    def export_adapter_weights(
        self, adapter_id: str, as_dict: Literal[True], dtype: str = "float32"
    ) -> Awaitable[dict[str, np.ndarray]]: ...
    def export_adapter_weights(self, adapter_id: str, as_dict: bool = False, dtype: str = "float32"):
        """See `TrainerClient.export_adapter_weights`."""
        opened = self._connection.start(self._open_export(export_request(adapter_id, dtype)))
        return _collect(opened) if as_dict else _iterate(opened)

    # The parts below start nothing: the blocking client shares them and runs them on its own loop.

    async def _load_base_model(self, model: str) -> AsyncGenerator[results.LoadProgress, None]:
        request = trainer_pb2.InitializeBaseModelRequest(model=model)
        async with contextlib.aclosing(self._connection.stream(self._stub.InitializeBaseModel, request)) as messages:
            async for message in messages:
                yield _decode.load_progress(message)

    async def _forward(self, request: trainer_pb2.ForwardRequest) -> results.ForwardResult:
        return _decode.forward_result(await self._connection.mutate(self._stub.Forward, request))

    def _sync_adapter_to_vllm(
        self, adapter_id: str, verify: Verification | bool, transport: Transport
    ) -> Coroutine[Any, Any, results.SyncResult]:
        request = sync_request(adapter_id, verify, transport)

        async def sync() -> results.SyncResult:
            return _decode.sync_result(await self._connection.mutate(self._stub.SyncAdapter, request))

        return sync()

    def _verify_adapter(
        self, adapter_id: str, verification: Verification | None
    ) -> Coroutine[Any, Any, results.VerifyResult]:
        verification = verification or Verification()
        request = trainer_pb2.VerifyAdapterRequest(adapter_id=adapter_id, verify=verification.to_proto())

        async def verify() -> results.VerifyResult:
            return _decode.verify_result(await self._connection.call(self._stub.VerifyAdapter, request))

        return verify()

    async def _import(
        self, begin: trainer_pb2.ImportBegin, lora: LoraConfig, weights: Mapping[str, np.ndarray]
    ) -> results.LoraAdapter:
        payload = b""

        async def attempt(timeout: float | None) -> trainer_pb2.ImportAdapterWeightsResponse | None:  # noqa: ASYNC109
            nonlocal payload
            if not payload:
                base_model = (await self.get_backend_info()).base_model
                fingerprint = base_model.fingerprint if base_model else ""
                manifest, payload = await asyncio.to_thread(adapter.pack, weights, lora, fingerprint)
                begin.manifest.CopyFrom(manifest)
            return await imports.send(self._stub, begin, payload, timeout, self._connection.peer)

        response = await self._connection.until_answered(attempt)
        return (
            _decode.lora_adapter(response.adapter) if response else (await self.training_run(begin.adapter_id)).adapter
        )

    async def _open_export(self, request: trainer_pb2.ExportAdapterWeightsRequest) -> "Export":
        """Returns when the manifest is there: the trainer has reached the export and will change nothing in it."""
        frames = self._connection.stream(self._stub.ExportAdapterWeights, request)
        return Export((await _frame(frames, "manifest")).manifest, frames)

    async def _write_peft_folder(self, export: "Export", folder: str | os.PathLike[str]) -> None:
        weights = {name: array async for name, array in export.arrays()}
        base_model = (await self.get_backend_info()).base_model
        await asyncio.to_thread(
            peft_folder.write,
            Path(folder),
            LoraConfig.from_proto(export.manifest.lora),
            weights,
            base_model.name if base_model else "",
            export.manifest.base_model_fingerprint,
        )

    async def _export_optimizer(self, request: trainer_pb2.ExportOptimizerStateRequest) -> results.ExportedOptimizer:
        frames = self._connection.stream(self._stub.ExportOptimizerState, request)
        async with contextlib.aclosing(frames):
            state = (await _frame(frames, "state")).state
            first = (await _frame(frames, "first_moment")).first_moment
            exp_avg = {name: array async for name, array in adapter.unpack(first, frames)}
            second = (await _frame(frames, "second_moment")).second_moment
            exp_avg_sq = {name: array async for name, array in adapter.unpack(second, frames)}
        return results.ExportedOptimizer(_decode.optimizer_state(state), exp_avg, exp_avg_sq)


class AsyncTrainingRun:
    """One adapter and the order of the operations on it; see `tinkerbell.TrainingRun`."""

    def __init__(self, client: AsyncTrainerClient, lora_adapter: results.LoraAdapter):
        """Made by `AsyncTrainerClient.create_lora_adapter` and `AsyncTrainerClient.training_run`."""
        self._client = client
        self._adapter = lora_adapter
        self._order = OperationOrder(lora_adapter.adapter_id, lora_adapter.next_seq_id)

    @property
    def adapter(self) -> results.LoraAdapter:
        """See `TrainingRun.adapter`."""
        return self._adapter

    @property
    def adapter_id(self) -> str:
        """See `TrainingRun.adapter_id`."""
        return self._adapter.adapter_id

    def forward(
        self,
        data: Sequence[Datum],
        loss: Loss = "cross_entropy",
        loss_config: LossConfig | None = None,
        **overrides: float,
    ) -> asyncio.Future[results.ForwardResult]:
        """See `TrainingRun.forward`."""
        return self._start(self._forward(data, loss, loss_config, overrides))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: Loss = "cross_entropy",
        loss_config: LossConfig | None = None,
        **overrides: float,
    ) -> asyncio.Future[results.ForwardBackwardResult]:
        """See `TrainingRun.forward_backward`."""
        return self._start(self._forward_backward(data, loss, loss_config, overrides))

    def forward_backward_custom(
        self, data: Sequence[Datum], fn: CustomLoss
    ) -> asyncio.Future[results.ForwardBackwardResult]:
        """See `TrainingRun.forward_backward_custom`."""
        return self._start(self._forward_backward_custom(data, fn))

    def optim_step(self, adam: AdamParams | None = None, **overrides: float) -> asyncio.Future[results.OptimStepResult]:
        """See `TrainingRun.optim_step`."""
        return self._start(self._optim_step(adam, overrides))

    def sync_adapter_to_vllm(
        self, verify: Verification | bool = False, transport: Transport = "auto"
    ) -> asyncio.Future[results.SyncResult]:
        """See `TrainingRun.sync_adapter_to_vllm`."""
        return self._start(self._sync_adapter_to_vllm(verify, transport))

    def verify_adapter(self, verification: Verification | None = None) -> asyncio.Future[results.VerifyResult]:
        """See `TrainingRun.verify_adapter`."""
        return self._client.verify_adapter(self.adapter_id, verification)

    def save_checkpoint(self, name: str = "", ttl_seconds: float = 0) -> asyncio.Future[results.Checkpoint]:
        """See `TrainingRun.save_checkpoint`."""
        return self._start(self._save_checkpoint(name, ttl_seconds))

    def load_checkpoint(self, checkpoint_id: str, fresh_optimizer: bool = False) -> asyncio.Future[results.LoraAdapter]:
        """See `TrainingRun.load_checkpoint`."""
        return self._start(self._load_checkpoint(checkpoint_id, fresh_optimizer))

    def import_adapter_weights(self, weights: imports.Weights) -> asyncio.Future[results.LoraAdapter]:
        """See `TrainingRun.import_adapter_weights`."""
        return self._start(self._import_adapter_weights(weights))

    @overload
    def export_adapter_weights(
        self, as_dict: Literal[False] = False, dtype: str = "float32"
    ) -> AsyncIterator[tuple[str, np.ndarray]]: ...
    @overload
    def export_adapter_weights(
        self, as_dict: Literal[True], dtype: str = "float32"
    ) -> Awaitable[dict[str, np.ndarray]]: ...
    def export_adapter_weights(self, as_dict: bool = False, dtype: str = "float32"):
        """See `TrainingRun.export_adapter_weights`."""
        opened = self._start(self._open_export(dtype))
        return _collect(opened) if as_dict else _iterate(opened)

    def export_peft_folder(self, folder: str | os.PathLike[str]) -> Awaitable[None]:
        """See `TrainingRun.export_peft_folder`."""
        return self._start(self._export_peft_folder(folder))

    def export_optimizer_state(self) -> Awaitable[results.ExportedOptimizer]:
        """See `TrainingRun.export_optimizer_state`."""
        return self._start(self._export_optimizer_state())

    async def get_optimizer_state(self) -> results.OptimizerState:
        """See `TrainingRun.get_optimizer_state`."""
        return await self._client.get_optimizer_state(self.adapter_id)

    async def remove(self) -> None:
        """See `TrainingRun.remove`."""
        await self._client.remove_lora_adapter(self.adapter_id)

    # Each function below checks its arguments, numbers the request in the calling thread and returns the call, not yet
    # started. A number that is taken must reach the trainer, so whoever runs the call may not cancel it.

    def _start(self, call: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        return asyncio.shield(self._client._connection.start(call))

    def _forward(
        self, data: Sequence[Datum], loss: Loss, loss_config: LossConfig | None, overrides: Mapping[str, float]
    ) -> Coroutine[Any, Any, results.ForwardResult]:
        request = forward_request(self.adapter_id, data, loss, loss_config, overrides)
        return self._numbered(request, self._client._stub.Forward, _decode.forward_result)

    def _forward_backward(
        self, data: Sequence[Datum], loss: Loss, loss_config: LossConfig | None, overrides: Mapping[str, float]
    ) -> Coroutine[Any, Any, results.ForwardBackwardResult]:
        request = trainer_pb2.ForwardBackwardRequest(
            adapter_id=self.adapter_id,
            request_id=new_request_id(),
            **loss_fields(data, loss, loss_config, overrides),
        )
        return self._numbered(request, self._client._stub.ForwardBackward, _decode.forward_backward_result)

    def _forward_backward_custom(
        self, data: Sequence[Datum], fn: CustomLoss
    ) -> Coroutine[Any, Any, results.ForwardBackwardResult]:
        data = list(data)
        forward = forward_request(self.adapter_id, data, "cross_entropy", None, {})
        no_gradient = [dataclasses.replace(datum, logprob_gradients=np.zeros(len(datum))) for datum in data]
        backward = trainer_pb2.ForwardBackwardRequest(
            adapter_id=self.adapter_id, request_id=new_request_id(), **loss_fields(no_gradient, "custom", None, {})
        )
        self._order.number_pair(forward, backward)
        return self._differentiate(data, fn, forward, backward)

    async def _differentiate(
        self,
        data: Sequence[Datum],
        fn: CustomLoss,
        forward: trainer_pb2.ForwardRequest,
        backward: trainer_pb2.ForwardBackwardRequest,
    ) -> results.ForwardBackwardResult:
        try:
            scored = await self._send(forward, self._client._stub.Forward, _decode.forward_result)
            # In a thread, since the loop has the program's other calls to make.
            loss, gradients = await asyncio.to_thread(custom_loss.evaluate, fn, data, scored.logprobs)
        except asyncio.CancelledError:
            self._order.abandon_pair(backward.seq_id)
            raise
        except Exception:
            await self._skip(backward.seq_id)
            raise
        for datum, gradient in zip(backward.data, gradients, strict=True):
            datum.loss_inputs["logprob_gradients"].CopyFrom(tensors.encode(gradient))
        self._order.finish_pair(backward.seq_id)
        result = await self._send(backward, self._client._stub.ForwardBackward, _decode.forward_backward_result)
        return dataclasses.replace(result, metrics={**result.metrics, "loss:sum": loss})

    async def _skip(self, seq_id: int) -> None:
        """Spends a number that was taken on something that changes nothing, as the trainer waits for it."""
        request = forward_request(self.adapter_id, [Datum([0], [0])], "cross_entropy", None, {})
        request.seq_id = seq_id
        self._order.finish_pair(seq_id)
        with contextlib.suppress(TinkerbellError):
            await self._send(request, self._client._stub.Forward, _decode.forward_result)

    def _optim_step(
        self, adam: AdamParams | None, overrides: Mapping[str, float]
    ) -> Coroutine[Any, Any, results.OptimStepResult]:
        adam = dataclasses.replace(adam or AdamParams(), **overrides)
        request = trainer_pb2.OptimStepRequest(
            adapter_id=self.adapter_id, adam=adam.to_proto(), request_id=new_request_id()
        )
        return self._numbered(request, self._client._stub.OptimStep, _decode.optim_step_result)

    def _sync_adapter_to_vllm(
        self, verify: Verification | bool, transport: Transport
    ) -> Coroutine[Any, Any, results.SyncResult]:
        request = sync_request(self.adapter_id, verify, transport)
        return self._numbered(request, self._client._stub.SyncAdapter, _decode.sync_result)

    def _save_checkpoint(self, name: str, ttl_seconds: float) -> Coroutine[Any, Any, results.Checkpoint]:
        request = trainer_pb2.SaveCheckpointRequest(
            adapter_id=self.adapter_id, name=name, ttl_seconds=ttl_seconds, request_id=new_request_id()
        )
        return self._numbered(
            request, self._client._stub.SaveCheckpoint, lambda response: _decode.checkpoint(response.checkpoint)
        )

    def _load_checkpoint(self, checkpoint_id: str, fresh_optimizer: bool) -> Coroutine[Any, Any, results.LoraAdapter]:
        request = trainer_pb2.LoadCheckpointRequest(
            adapter_id=self.adapter_id,
            checkpoint_id=checkpoint_id,
            fresh_optimizer=fresh_optimizer,
            request_id=new_request_id(),
        )
        return self._numbered(
            request, self._client._stub.LoadCheckpoint, lambda response: _decode.lora_adapter(response.adapter)
        )

    def _import_adapter_weights(self, weights: imports.Weights) -> Coroutine[Any, Any, results.LoraAdapter]:
        lora, arrays = imports.read_for(self._adapter.lora, weights)
        begin = trainer_pb2.ImportBegin(adapter_id=self.adapter_id, request_id=new_request_id())
        self._order.number(begin)
        return self._sending(begin, lambda: self._client._import(begin, lora, arrays))

    def _open_export(self, dtype: str) -> "Coroutine[Any, Any, Export]":
        request = export_request(self.adapter_id, dtype)
        self._order.number(request)
        return self._sending(request, lambda: self._client._open_export(request))

    def _export_peft_folder(self, folder: str | os.PathLike[str]) -> Coroutine[Any, Any, None]:
        opening = self._open_export("float32")

        async def write() -> None:
            await self._client._write_peft_folder(await opening, folder)

        return write()

    def _export_optimizer_state(self) -> Coroutine[Any, Any, results.ExportedOptimizer]:
        request = trainer_pb2.ExportOptimizerStateRequest(adapter_id=self.adapter_id)
        self._order.number(request)
        return self._sending(request, lambda: self._client._export_optimizer(request))

    def _numbered(self, request: Any, method: Any, decode: Callable[[Any], T]) -> Coroutine[Any, Any, T]:
        self._order.number(request)
        return self._send(request, method, decode)

    async def _send(self, request: Any, method: Any, decode: Callable[[Any], T]) -> T:
        return decode(await self._sending(request, lambda: self._client._connection.mutate(method, request)))

    async def _sending(self, request: Any, call: Callable[[], Awaitable[T]]) -> T:
        async with self._order.sending(request):
            return await call()


@dataclasses.dataclass(frozen=True)
class Export:
    """An export that has begun."""

    manifest: common_pb2.AdapterManifest
    """What it brings."""
    _frames: AsyncGenerator[Any, None]

    async def arrays(self) -> NamedArrays:
        """(PEFT name, array) of each tensor as it comes."""
        async with contextlib.aclosing(self._frames):
            async for pair in adapter.unpack(self.manifest, self._frames):
                yield pair


def forward_request(
    adapter_id: str,
    data: Sequence[Datum],
    loss: Loss,
    loss_config: LossConfig | None,
    overrides: Mapping[str, float],
) -> trainer_pb2.ForwardRequest:
    """The request for logprobs. ValueError or TypeError when data, loss or a parameter are none."""
    return trainer_pb2.ForwardRequest(
        adapter_id=adapter_id, request_id=new_request_id(), **loss_fields(data, loss, loss_config, overrides)
    )


def loss_fields(
    data: Sequence[Datum], loss: Loss, loss_config: LossConfig | None, overrides: Mapping[str, float]
) -> dict[str, Any]:
    """What Forward and ForwardBackward have in common."""
    if overrides:
        loss_config = dataclasses.replace(loss_config or LossConfig(), **overrides)
    return {
        "loss": loss_function(loss),
        "data": [datum.to_proto(loss) for datum in data],
        "loss_config": loss_config.to_proto() if loss_config else None,
    }


def export_request(adapter_id: str, dtype: str) -> trainer_pb2.ExportAdapterWeightsRequest:
    """The request for an export. ValueError when `dtype` is no type's name."""
    return trainer_pb2.ExportAdapterWeightsRequest(adapter_id=adapter_id, dtype=tensors.dtype_from_name(dtype))


async def _frame(frames: AsyncGenerator[Any, None], field: str) -> Any:
    frame = await anext(frames, None)
    if frame is None or not frame.HasField(field):
        raise InternalError(f"the trainer's export has no {field} where it should")
    return frame


async def _iterate(opened: asyncio.Future[Export]) -> NamedArrays:
    async with contextlib.aclosing((await opened).arrays()) as arrays:
        async for name, array in arrays:
            yield name, array


async def _collect(opened: asyncio.Future[Export]) -> dict[str, np.ndarray]:
    return {name: array async for name, array in (await opened).arrays()}


def sync_request(adapter_id: str, verify: Verification | bool, transport: Transport) -> trainer_pb2.SyncAdapterRequest:
    """The request to publish an adapter. ValueError when a probe is none, or a transport."""
    request = trainer_pb2.SyncAdapterRequest(
        adapter_id=adapter_id, request_id=new_request_id(), transport=transport_to_proto(transport)
    )
    if verify:
        request.verify.CopyFrom((Verification() if verify is True else verify).to_proto())
    return request
