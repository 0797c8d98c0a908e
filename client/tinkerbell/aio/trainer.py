"""The trainer's client for asyncio."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, overload

import numpy as np

from tinkerbell import _decode, adapter, results, tensors
from tinkerbell._connection import Connection, T
from tinkerbell._order import OperationOrder
from tinkerbell.errors import InternalError, NotFoundError
from tinkerbell.inputs import AdamParams, Datum
from tinkerbell.v1 import common_pb2, trainer_pb2, trainer_pb2_grpc

NamedArrays = AsyncGenerator[tuple[str, np.ndarray], None]


class AsyncTrainerClient:
    """A connection to a trainer; see `tinkerbell.TrainerClient`."""

    def __init__(self, address: str, timeout: float | None = None):
        """`address`: HOST:PORT. `timeout`: seconds that each call may take; None means no limit."""
        self._connection = Connection("the trainer", address, timeout)
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
        rank: int = 32,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int = 0,
    ) -> "AsyncTrainingRun":
        """See `TrainerClient.create_lora_adapter`."""
        lora = common_pb2.LoraConfig(rank=rank, alpha=alpha, target_modules=target_modules)
        request = trainer_pb2.CreateLoraAdapterRequest(adapter_id=adapter_id, lora=lora, seed=seed)
        response = await self._connection.call(self._stub.CreateLoraAdapter, request)
        return AsyncTrainingRun(self, _decode.lora_adapter(response.adapter))

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
        request = trainer_pb2.RemoveLoraAdapterRequest(adapter_id=adapter_id)
        await self._connection.call(self._stub.RemoveLoraAdapter, request)

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

    def forward(self, data: Sequence[Datum], adapter_id: str = "") -> asyncio.Future[results.ForwardResult]:
        """See `TrainerClient.forward`."""
        return self._connection.start(self._forward(data, adapter_id))

    def sync_adapter_to_vllm(self, adapter_id: str) -> asyncio.Future[results.SyncResult]:
        """See `TrainerClient.sync_adapter_to_vllm`."""
        return self._connection.start(self._sync_adapter_to_vllm(adapter_id))

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

    def _forward(self, data: Sequence[Datum], adapter_id: str) -> Coroutine[Any, Any, results.ForwardResult]:
        request = trainer_pb2.ForwardRequest(adapter_id=adapter_id, data=[datum.to_proto() for datum in data])
        return self._call(self._stub.Forward, request, _decode.forward_result)

    def _sync_adapter_to_vllm(self, adapter_id: str) -> Coroutine[Any, Any, results.SyncResult]:
        request = trainer_pb2.SyncAdapterRequest(adapter_id=adapter_id)
        return self._call(self._stub.SyncAdapter, request, _decode.sync_result)

    async def _call(self, method: Any, request: Any, decode: Callable[[Any], T]) -> T:
        return decode(await self._connection.call(method, request))

    async def _open_export(self, request: trainer_pb2.ExportAdapterWeightsRequest) -> NamedArrays:
        """Returns when the manifest is there: the trainer has reached the export and will change nothing in it."""
        frames = self._connection.stream(self._stub.ExportAdapterWeights, request)
        first = await anext(frames, None)
        if first is None or not first.HasField("manifest"):
            raise InternalError("the trainer began the export without a manifest")
        return adapter.unpack(first.manifest, frames)


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

    def forward(self, data: Sequence[Datum]) -> asyncio.Future[results.ForwardResult]:
        """See `TrainingRun.forward`."""
        return self._start(self._forward(data))

    def forward_backward(self, data: Sequence[Datum]) -> asyncio.Future[results.ForwardBackwardResult]:
        """See `TrainingRun.forward_backward`."""
        return self._start(self._forward_backward(data))

    def optim_step(self, adam: AdamParams | None = None, **overrides: float) -> asyncio.Future[results.OptimStepResult]:
        """See `TrainingRun.optim_step`."""
        return self._start(self._optim_step(adam, overrides))

    def sync_adapter_to_vllm(self) -> asyncio.Future[results.SyncResult]:
        """See `TrainingRun.sync_adapter_to_vllm`."""
        return self._start(self._sync_adapter_to_vllm())

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

    def _forward(self, data: Sequence[Datum]) -> Coroutine[Any, Any, results.ForwardResult]:
        request = trainer_pb2.ForwardRequest(adapter_id=self.adapter_id, data=[datum.to_proto() for datum in data])
        return self._numbered(request, self._client._stub.Forward, _decode.forward_result)

    def _forward_backward(self, data: Sequence[Datum]) -> Coroutine[Any, Any, results.ForwardBackwardResult]:
        messages = [datum.to_proto() for datum in data]
        request = trainer_pb2.ForwardBackwardRequest(adapter_id=self.adapter_id, data=messages)
        return self._numbered(request, self._client._stub.ForwardBackward, _decode.forward_backward_result)

    def _optim_step(
        self, adam: AdamParams | None, overrides: dict[str, float]
    ) -> Coroutine[Any, Any, results.OptimStepResult]:
        adam = dataclasses.replace(adam or AdamParams(), **overrides)
        request = trainer_pb2.OptimStepRequest(adapter_id=self.adapter_id, adam=adam.to_proto())
        return self._numbered(request, self._client._stub.OptimStep, _decode.optim_step_result)

    def _sync_adapter_to_vllm(self) -> Coroutine[Any, Any, results.SyncResult]:
        request = trainer_pb2.SyncAdapterRequest(adapter_id=self.adapter_id)
        return self._numbered(request, self._client._stub.SyncAdapter, _decode.sync_result)

    def _open_export(self, dtype: str) -> Coroutine[Any, Any, NamedArrays]:
        request = export_request(self.adapter_id, dtype)
        self._order.number(request)
        return self._sending(request, self._client._open_export(request))

    def _numbered(self, request: Any, method: Any, decode: Callable[[Any], T]) -> Coroutine[Any, Any, T]:
        self._order.number(request)
        return self._sending(request, self._client._call(method, request, decode))

    async def _sending(self, request: Any, call: Coroutine[Any, Any, T]) -> T:
        with self._order.sending(request):
            return await call


def export_request(adapter_id: str, dtype: str) -> trainer_pb2.ExportAdapterWeightsRequest:
    """The request for an export. ValueError when `dtype` is no type's name."""
    return trainer_pb2.ExportAdapterWeightsRequest(adapter_id=adapter_id, dtype=tensors.dtype_from_name(dtype))


async def _iterate(opened: asyncio.Future[NamedArrays]) -> NamedArrays:
    async with contextlib.aclosing(await opened) as arrays:
        async for name, array in arrays:
            yield name, array


async def _collect(opened: asyncio.Future[NamedArrays]) -> dict[str, np.ndarray]:
    return {name: array async for name, array in await opened}
