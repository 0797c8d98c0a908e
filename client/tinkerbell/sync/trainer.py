"""The trainer's client for programs that block."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Literal, overload

import numpy as np

from tinkerbell import _decode, results
from tinkerbell._background import loop_thread
from tinkerbell.aio.trainer import AsyncTrainerClient, AsyncTrainingRun, export_request
from tinkerbell.inputs import AdamParams, Datum


class TrainerClient:
    """A connection to a trainer.

        with TrainerClient("localhost:50051") as trainer:
            run = trainer.create_lora_adapter("alice")
            for batch in batches:
                loss = run.forward_backward(batch)  # a future: the step below is on its way before the loss is back
                run.optim_step(learning_rate=1e-4)
                print(loss.result().loss)

    Nothing is sent before the first call. A call to a trainer that can't be reached raises UnavailableError at once;
    calls that only read are tried a few times first. `tinkerbell.errors` lists what else a call can raise.
    """

    def __init__(self, address: str, timeout: float | None = None):
        """`address`: HOST:PORT. `timeout`: seconds that each call may take; None means no limit."""

        async def connect() -> AsyncTrainerClient:
            return AsyncTrainerClient(address, timeout)

        self._loop = loop_thread()
        self._client = self._loop.run(connect())

    def __enter__(self) -> "TrainerClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Wait for the futures you care about first: calls still running are cancelled."""
        self._loop.run(self._client.close())

    def initialize_base_model(
        self, model: str, on_progress: Callable[[results.LoadProgress], None] | None = None
    ) -> results.BaseModelInfo:
        """Loads the base model, which takes from seconds to many minutes, and describes it.

        `model`: a folder with a Hugging Face checkpoint on the trainer's host, or a hub name. `on_progress` is called,
        in this thread, as each stage begins. The same model again is a success at once; another one is a
        FailedPreconditionError.
        """
        progress = None
        for progress in self._loop.iterate(self._client._load_base_model(model)):
            if on_progress:
                on_progress(progress)
        return _decode.loaded_model(progress)

    def get_backend_info(self) -> results.TrainerInfo:
        """Base model, device, versions and limits of the trainer."""
        return self._loop.run(self._client.get_backend_info())

    def create_lora_adapter(
        self,
        adapter_id: str,
        rank: int = 32,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int = 0,
    ) -> "TrainingRun":
        """Creates an adapter that computes what the base model computes, and its optimizer.

        `adapter_id`: 1 to 64 of [A-Za-z0-9._-], starting with a letter or digit. `alpha`: numerator of the scale
        alpha / rank; None means 32. `target_modules`: among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and
        down_proj; None means all. `seed`: of A's initial values.

        AlreadyExistsError when there is an adapter of that name: `training_run` goes on with it.
        """
        run = self._loop.run(self._client.create_lora_adapter(adapter_id, rank, alpha, target_modules, seed))
        return TrainingRun(run)

    def training_run(self, adapter_id: str) -> "TrainingRun":
        """Goes on with an adapter that exists. NotFoundError when it does not.

        Use one run per adapter at a time: each counts the adapter's operations by itself.
        """
        return TrainingRun(self._loop.run(self._client.training_run(adapter_id)))

    def list_lora_adapters(self) -> list[results.LoraAdapter]:
        """The resident adapters in order of creation."""
        return self._loop.run(self._client.list_lora_adapters())

    def remove_lora_adapter(self, adapter_id: str) -> None:
        """Removes an adapter after the operations on it that have reached the trainer.

        Published versions stay on the sampler until they are unloaded there.
        """
        self._loop.run(self._client.remove_lora_adapter(adapter_id))

    def get_optimizer_state(self, adapter_id: str) -> results.OptimizerState:
        """Describes one adapter's optimizer."""
        return self._loop.run(self._client.get_optimizer_state(adapter_id))

    def list_optimizer_states(self) -> list[results.OptimizerState]:
        """Describes the optimizers of all adapters, in order of creation and without their tensors."""
        return self._loop.run(self._client.list_optimizer_states())

    def forward(self, data: Sequence[Datum], adapter_id: str = "") -> Future[results.ForwardResult]:
        """Logprobs and loss under an adapter, or under the bare base model when `adapter_id` is empty. No gradients.

        Not numbered: it runs when it arrives. To see the effect of operations that are on their way, use
        `TrainingRun.forward`.
        """
        return self._loop.submit(self._client._forward(data, adapter_id))

    def sync_adapter_to_vllm(self, adapter_id: str) -> Future[results.SyncResult]:
        """As `TrainingRun.sync_adapter_to_vllm`, but not numbered: it runs when it arrives."""
        return self._loop.submit(self._client._sync_adapter_to_vllm(adapter_id))

    @overload
    def export_adapter_weights(
        self, adapter_id: str, as_dict: Literal[False] = False, dtype: str = "float32"
    ) -> Iterator[tuple[str, np.ndarray]]: ...
    @overload
    def export_adapter_weights(
        self, adapter_id: str, as_dict: Literal[True], dtype: str = "float32"
    ) -> dict[str, np.ndarray]: ...
    def export_adapter_weights(self, adapter_id: str, as_dict: bool = False, dtype: str = "float32"):
        """As `TrainingRun.export_adapter_weights`, but not numbered: it runs when it arrives."""
        arrays = self._loop.iterate(self._loop.run(self._client._open_export(export_request(adapter_id, dtype))))
        return dict(arrays) if as_dict else arrays


class TrainingRun:
    """One adapter and the order of the operations on it.

    `forward`, `forward_backward`, `optim_step`, `sync_adapter_to_vllm` and `export_adapter_weights` are numbered as
    they are called, from whatever thread, and the trainer runs them in that order. So a program need not wait for one
    before it calls the next. A number is taken only when the request is valid and about to be sent.

    Cancelling the future of a numbered operation drops its result and nothing else: the operation still happens, since
    the trainer would wait for a number that never comes. For the same reason a run ends when one of its operations gets
    no answer (UnavailableError, DeadlineExceededError): further ones raise FailedPreconditionError with the reason
    OPERATION_UNANSWERED. `TrainerClient.training_run` then asks the trainer which number comes next.

    Made by `TrainerClient.create_lora_adapter` and `TrainerClient.training_run`.
    """

    def __init__(self, run: AsyncTrainingRun):
        self._loop = loop_thread()
        self._run = run

    @property
    def adapter(self) -> results.LoraAdapter:
        """The adapter as it was when this run began."""
        return self._run.adapter

    @property
    def adapter_id(self) -> str:
        """The adapter's name."""
        return self._run.adapter_id

    def forward(self, data: Sequence[Datum]) -> Future[results.ForwardResult]:
        """Logprobs and loss of `data`, at least one datum. No gradients."""
        return self._loop.submit_to_the_end(self._run._forward(data))

    def forward_backward(self, data: Sequence[Datum]) -> Future[results.ForwardBackwardResult]:
        """Logprobs and loss of `data`, at least one datum; adds the loss's gradient to the accumulated gradient.

        The loss is the sum over tokens of -weight * log p(target), so the gradients of two calls add up to the gradient
        of one call with both batches.
        """
        return self._loop.submit_to_the_end(self._run._forward_backward(data))

    def optim_step(self, adam: AdamParams | None = None, **overrides: float) -> Future[results.OptimStepResult]:
        """Applies the accumulated gradient with AdamW and clears it.

        Hyper-parameters come as AdamParams, as its fields by keyword, or both, where keywords win:
        `optim_step(learning_rate=3e-4)`. TypeError on a keyword that is not a field.
        """
        return self._loop.submit_to_the_end(self._run._optim_step(adam, overrides))

    def sync_adapter_to_vllm(self) -> Future[results.SyncResult]:
        """Publishes the current weights as a new immutable version; done when the sampler serves it.

        Weights that did not change since the last version keep that version and move no bytes.
        """
        return self._loop.submit_to_the_end(self._run._sync_adapter_to_vllm())

    @overload
    def export_adapter_weights(
        self, as_dict: Literal[False] = False, dtype: str = "float32"
    ) -> Iterator[tuple[str, np.ndarray]]: ...
    @overload
    def export_adapter_weights(self, as_dict: Literal[True], dtype: str = "float32") -> dict[str, np.ndarray]: ...
    def export_adapter_weights(self, as_dict: bool = False, dtype: str = "float32"):
        """The weights under their PEFT names, as (name, array) pairs or as a dict.

        `dtype`: "float32", which is exact, or "bfloat16", which halves what travels; the arrays are float32 either way
        and read-only. Pairs come as the bytes arrive. DataLossError when a chunk is damaged, or, at the end, when the
        whole does not have the digest that the trainer announced: trust the pairs when the iteration has ended.
        """
        opened = self._loop.submit_to_the_end(self._run._open_export(dtype))
        arrays = self._loop.iterate(self._loop.wait(opened))
        return dict(arrays) if as_dict else arrays

    def get_optimizer_state(self) -> results.OptimizerState:
        """Describes the optimizer as it is when the question arrives; wait for your steps first."""
        return self._loop.run(self._run.get_optimizer_state())

    def remove(self) -> None:
        """Removes the adapter after the operations that have reached the trainer; wait for yours first."""
        self._loop.run(self._run.remove())
