"""The trainer's client for programs that block."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal, overload

import numpy as np

from tinkerbell import _decode, imports, results
from tinkerbell._background import loop_thread
from tinkerbell._retry import DEFAULT_RETRY, Retry
from tinkerbell.aio.trainer import AsyncTrainerClient, AsyncTrainingRun, export_request, forward_request
from tinkerbell.custom_loss import CustomLoss
from tinkerbell.inputs import AdamParams, Datum, Loss, LossConfig, Transport, Verification


class TrainerClient:
    """A connection to a trainer.

        with TrainerClient("localhost:50051") as trainer:
            run = trainer.create_lora_adapter("alice")
            for batch in batches:
                loss = run.forward_backward(batch)  # a future: the step below is on its way before the loss is back
                run.optim_step(learning_rate=1e-4)
                print(loss.result().loss)

    Nothing is sent before the first call. A call that gets no answer is sent again: one that only reads a few times
    within a second, one that changes something, or computes, for as long as `Retry` says. It carries a request_id, the
    same in all attempts, by which the trainer knows what it has done already; so it is done once however often it is
    sent. Then the call raises UnavailableError. `tinkerbell.errors` lists what else a call can raise.
    """

    def __init__(self, address: str, timeout: float | None = None, retry: Retry = DEFAULT_RETRY):
        """`address`: HOST:PORT. `timeout`: seconds that each call may take, all attempts together; None: no limit."""

        async def connect() -> AsyncTrainerClient:
            return AsyncTrainerClient(address, timeout, retry)

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
        rank: int | None = None,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int = 0,
        use_rslora: bool = False,
        *,
        from_checkpoint: str = "",
        fresh_optimizer: bool = False,
    ) -> "TrainingRun":
        """Creates an adapter and its optimizer.

        It computes what the base model computes. `adapter_id`: 1 to 64 of [A-Za-z0-9._-], starting with a letter or
        digit. `rank`: None means 32. `alpha`: numerator of the scale alpha / rank, or with `use_rslora` alpha /
        sqrt(rank); None means 32. `target_modules`: among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and
        down_proj; None means all. `seed`: of A's initial values.

        Or it starts from a checkpoint, by its id, which brings shape, weights and, without `fresh_optimizer`, step and
        moments. ValueError when the shape is given too.

        AlreadyExistsError when there is an adapter of that name: `training_run` goes on with it.
        """
        creation = self._client.create_lora_adapter(
            adapter_id,
            rank,
            alpha,
            target_modules,
            seed,
            use_rslora,
            from_checkpoint=from_checkpoint,
            fresh_optimizer=fresh_optimizer,
        )
        return TrainingRun(self._loop.run(creation))

    def import_adapter_weights(
        self,
        adapter_id: str,
        weights: imports.Weights,
        rank: int | None = None,
        alpha: float | None = None,
        use_rslora: bool | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
    ) -> "TrainingRun":
        """Makes an adapter of weights that were trained elsewhere. Its optimizer is new.

        `weights`: a PEFT folder (adapter_config.json and adapter_model.safetensors), which says all else itself; or
        arrays by PEFT name, A [rank, in] and B [out, rank], float32, float16 or bfloat16, with their `rank` and `alpha`
        and, as in PEFT, whatever of `use_rslora`, `rank_pattern` and `alpha_pattern` applies.

        ValueError, naming the key or the tensor, for what is not LoRA on linear layers: DoRA, biases, embeddings,
        trained tokens or weights of the base model, an A without its B. The trainer refuses layers that the base model
        does not have. When there is an adapter of that name its weights are replaced, after the operations that have
        reached the trainer; to have yours counted, use `TrainingRun.import_adapter_weights`.
        """
        importing = self._client.import_adapter_weights(
            adapter_id, weights, rank, alpha, use_rslora, rank_pattern, alpha_pattern
        )
        return TrainingRun(self._loop.run(importing))

    def training_run(self, adapter_id: str) -> "TrainingRun":
        """Goes on with an adapter that exists. NotFoundError when it does not.

        Use one run per adapter at a time: each counts the adapter's operations by itself.
        """
        return TrainingRun(self._loop.run(self._client.training_run(adapter_id)))

    def list_lora_adapters(self) -> list[results.LoraAdapter]:
        """The adapters in order of creation."""
        return self._loop.run(self._client.list_lora_adapters())

    def remove_lora_adapter(self, adapter_id: str) -> None:
        """Removes an adapter after the operations on it that have begun; wait for yours first.

        Published versions stay on the sampler until they are unloaded there.
        """
        self._loop.run(self._client.remove_lora_adapter(adapter_id))

    def get_optimizer_state(self, adapter_id: str) -> results.OptimizerState:
        """Describes one adapter's optimizer."""
        return self._loop.run(self._client.get_optimizer_state(adapter_id))

    def list_optimizer_states(self) -> list[results.OptimizerState]:
        """Describes the optimizers of all adapters, in order of creation and without their tensors."""
        return self._loop.run(self._client.list_optimizer_states())

    def export_optimizer_state(self, adapter_id: str) -> results.ExportedOptimizer:
        """As `TrainingRun.export_optimizer_state`, but not numbered: it runs between two numbered operations."""
        return self._loop.run(self._client.export_optimizer_state(adapter_id))

    def list_checkpoints(self, adapter_id: str = "") -> list[results.Checkpoint]:
        """The checkpoints of one adapter, which need not exist any more, or of all, oldest first."""
        return self._loop.run(self._client.list_checkpoints(adapter_id))

    def delete_checkpoint(self, checkpoint_id: str) -> None:
        """Deletes a checkpoint. NotFoundError when there is none of that id."""
        self._loop.run(self._client.delete_checkpoint(checkpoint_id))

    def forward(
        self,
        data: Sequence[Datum],
        adapter_id: str = "",
        loss: Loss = "cross_entropy",
        loss_config: LossConfig | None = None,
        **overrides: float,
    ) -> Future[results.ForwardResult]:
        """Logprobs and loss under an adapter, or under the bare base model when `adapter_id` is empty. No gradients.

        Not numbered: it runs when it arrives. To see the effect of operations that are on their way, use
        `TrainingRun.forward`.
        """
        request = forward_request(adapter_id, data, loss, loss_config, overrides)
        return self._loop.submit(self._client._forward(request))

    def sync_adapter_to_vllm(
        self, adapter_id: str, verify: Verification | bool = False, transport: Transport = "auto"
    ) -> Future[results.SyncResult]:
        """As `TrainingRun.sync_adapter_to_vllm`, but not numbered: it runs between two numbered operations."""
        return self._loop.submit(self._client._sync_adapter_to_vllm(adapter_id, verify, transport))

    def verify_adapter(self, adapter_id: str, verification: Verification | None = None) -> Future[results.VerifyResult]:
        """Compares the version that the samplers serve with the weights that the trainer holds.

        An adapter that was trained after its last sync differs for good reason; `steps_since` tells.
        """
        return self._loop.submit(self._client._verify_adapter(adapter_id, verification))

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
        export = self._loop.run(self._client._open_export(export_request(adapter_id, dtype)))
        arrays = self._loop.iterate(export.arrays())
        return dict(arrays) if as_dict else arrays

    def export_peft_folder(self, adapter_id: str, folder: str | os.PathLike[str]) -> None:
        """As `TrainingRun.export_peft_folder`, but not numbered: it runs when it arrives."""
        self._loop.run(self._client.export_peft_folder(adapter_id, folder))


class TrainingRun:
    """One adapter and the order of the operations on it.

    Everything but `get_optimizer_state` and `remove` is numbered as it is called, from whatever thread, and the trainer
    runs it in that order. So a program need not wait for one operation before it calls the next. A number is taken only
    when the request is valid and about to be sent.

    Cancelling the future of a numbered operation drops its result and nothing else: the operation still happens, since
    the trainer would wait for a number that never comes. For the same reason a run ends when one of its operations gets
    no answer to any attempt (UnavailableError, DeadlineExceededError): further ones raise FailedPreconditionError with
    the reason OPERATION_UNANSWERED. It ends too when the trainer's place is another than the run's, with the reason
    that the trainer gave:

    - SEQ_ID_USED: somebody else, perhaps another run, works on this adapter.
    - SEQ_ID_GAP: an operation before this one never came.
    - ADAPTER_RESTORED: the trainer has restarted, and the adapter stands at an earlier checkpoint; the metadata has its
      `step` and `next_seq_id`.

    `TrainerClient.training_run` then asks the trainer and gives a new run at the right place. Its `adapter.step` says
    how many steps are in, so a program that can say what its step k was goes on from there.

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

    def forward(
        self,
        data: Sequence[Datum],
        loss: Loss = "cross_entropy",
        loss_config: LossConfig | None = None,
        **overrides: float,
    ) -> Future[results.ForwardResult]:
        """Logprobs and loss of `data`, at least one datum. No gradients. The rest as in `forward_backward`."""
        return self._loop.submit_to_the_end(self._run._forward(data, loss, loss_config, overrides))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: Loss = "cross_entropy",
        loss_config: LossConfig | None = None,
        **overrides: float,
    ) -> Future[results.ForwardBackwardResult]:
        """Logprobs and loss of `data`, at least one datum; adds the loss's gradient to the accumulated gradient.

        `loss` is one of `tinkerbell.inputs.Loss`, which says what each computes of a Datum. It is a sum over tokens, so
        the gradients of two calls add up to the gradient of one call with both batches. Its numbers come as LossConfig,
        as fields of it by keyword, or both, where keywords win: `forward_backward(data, "ppo",
        clip_high_threshold=1.3)`. ValueError when a datum lacks what the loss takes.
        """
        return self._loop.submit_to_the_end(self._run._forward_backward(data, loss, loss_config, overrides))

    def forward_backward_custom(self, data: Sequence[Datum], fn: CustomLoss) -> Future[results.ForwardBackwardResult]:
        """As `forward_backward`, for any loss of the logprobs that you can differentiate.

        `fn(data, logprobs)` gets the float32 [N] logprobs of each datum and returns the loss and, for each datum, its
        derivative with respect to them, [N]; `tinkerbell.torch_loss` makes one of a PyTorch function. It runs once, in
        another thread. The result's loss is what it returned.

        These are two operations, a forward and a backward pass. Both take their numbers when this is called, so that an
        `optim_step` called next comes after the gradient; what is called meanwhile leaves this process when `fn` has
        returned. What `fn` raises, and ValueError for derivatives of the wrong shape, come out of the future; the
        gradient is then not added, and the operations after it happen.
        """
        return self._loop.submit_to_the_end(self._run._forward_backward_custom(data, fn))

    def optim_step(self, adam: AdamParams | None = None, **overrides: float) -> Future[results.OptimStepResult]:
        """Applies the accumulated gradient with AdamW and clears it.

        Hyper-parameters come as AdamParams, as its fields by keyword, or both, where keywords win:
        `optim_step(learning_rate=3e-4)`. TypeError on a keyword that is not a field.
        """
        return self._loop.submit_to_the_end(self._run._optim_step(adam, overrides))

    def sync_adapter_to_vllm(
        self, verify: Verification | bool = False, transport: Transport = "auto"
    ) -> Future[results.SyncResult]:
        """Publishes the current weights as a new immutable version; done when all samplers serve it.

        When one of them fails, none changes, and the error says which failed. One that cannot be reached at all is left
        out, and gets the version when it is back. Weights that did not change since the last version keep that version
        and move no bytes.

        `verify`: let every sampler score a probe first, and publish only what agrees with the trainer, or else raise
        FailedPreconditionError (SAMPLER_DISAGREES).

        `transport`: "auto", the fastest way to each sampler; "grpc"; or "cuda_ipc", which raises
        FailedPreconditionError (CUDA_IPC_UNAVAILABLE) when a sampler is not on the trainer's host, or one of them has
        CUDA IPC switched off.
        """
        return self._loop.submit_to_the_end(self._run._sync_adapter_to_vllm(verify, transport))

    def verify_adapter(self, verification: Verification | None = None) -> Future[results.VerifyResult]:
        """See `TrainerClient.verify_adapter`; not numbered: it runs when it arrives."""
        return self._loop.submit(self._run._client._verify_adapter(self.adapter_id, verification))

    def save_checkpoint(self, name: str = "", ttl_seconds: float = 0) -> Future[results.Checkpoint]:
        """Writes weights, optimizer and place in the order of operations to the trainer's disk.

        A gradient that no `optim_step` has applied is not part of it. `name`: of the same form as an adapter's; empty
        means "step-" and the number of steps. `ttl_seconds`: time after which it deletes itself; 0 means never.
        """
        return self._loop.submit_to_the_end(self._run._save_checkpoint(name, ttl_seconds))

    def load_checkpoint(self, checkpoint_id: str, fresh_optimizer: bool = False) -> Future[results.LoraAdapter]:
        """Takes the adapter back to one of its checkpoints, or to one of another adapter of the same shape.

        This run goes on: the order of operations is not taken back. `fresh_optimizer`: step and moments start anew.
        """
        return self._loop.submit_to_the_end(self._run._load_checkpoint(checkpoint_id, fresh_optimizer))

    def import_adapter_weights(self, weights: imports.Weights) -> Future[results.LoraAdapter]:
        """Replaces the weights by others of the same shape; the optimizer starts anew.

        `weights` as in `TrainerClient.import_adapter_weights`; arrays have this adapter's rank and alpha. They are read
        before this returns, and ValueError says what is wrong with them.
        """
        return self._loop.submit_to_the_end(self._run._import_adapter_weights(weights))

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
        arrays = self._loop.iterate(self._loop.wait(opened).arrays())
        return dict(arrays) if as_dict else arrays

    def export_peft_folder(self, folder: str | os.PathLike[str]) -> None:
        """Makes a folder with the weights, float32, that PeftModel.from_pretrained reads.

        It is there whole or not at all. FileExistsError when there is something of that name.
        """
        self._loop.wait(self._loop.submit_to_the_end(self._run._export_peft_folder(folder)))

    def export_optimizer_state(self) -> results.ExportedOptimizer:
        """The optimizer with the moments of all tensors, float32. DataLossError as in `export_adapter_weights`."""
        return self._loop.wait(self._loop.submit_to_the_end(self._run._export_optimizer_state()))

    def get_optimizer_state(self) -> results.OptimizerState:
        """Describes the optimizer as it is when the question arrives; wait for your steps first."""
        return self._loop.run(self._run.get_optimizer_state())

    def remove(self) -> None:
        """Removes the adapter after the operations that have begun; wait for yours first."""
        self._loop.run(self._run.remove())
