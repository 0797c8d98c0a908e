"""The engine: one frozen base model and the resident adapters. Synchronous, and used by one thread at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from service_common import errors, lora
from service_common.checkpoint import Checkpoint
from tinkerbell import payload
from tinkerbell.v1 import common_pb2
from trainer_service import adamw, batch
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.lora.arena import Arena
from trainer_service.lora.routing import Segment
from trainer_service.losses import LOSSES, Loss
from trainer_service.megatron import loading

if TYPE_CHECKING:
    from trainer_service.megatron.model import BaseModel

TORCH_DTYPES = {common_pb2.DATA_TYPE_FLOAT32: torch.float32, common_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16}


@dataclass(frozen=True)
class Limits:
    """What the engine accepts."""

    max_rank: int = 64
    # Tokens in one request, and in one pass through the model. Activations of a pass take memory, a request does not.
    max_batch_tokens: int = 65536
    max_pass_tokens: int = 4096


@dataclass
class Adapter:
    """A resident adapter."""

    adapter_id: str
    config: common_pb2.LoraConfig
    seed: int
    arena: Arena
    step: int = 0
    accumulated_calls: int = 0
    last_adam: AdamParams | None = None


@dataclass(frozen=True)
class PassResult:
    """Log-probabilities per datum, float32 [N] each, and the metrics of the batch."""

    logprobs: list[np.ndarray]
    metrics: dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """Steps applied so far and the gradient's L2 norm before clipping."""

    step: int
    grad_norm: float


@dataclass(frozen=True)
class TensorMoments:
    """L2 norms of one tensor's AdamW moments."""

    name: str
    shape: tuple[int, int]
    exp_avg_norm: float
    exp_avg_sq_norm: float


@dataclass(frozen=True)
class OptimizerState:
    """One adapter's optimizer, summed up."""

    adapter_id: str
    step: int
    last_adam: AdamParams | None
    accumulated_calls: int
    size_bytes: int
    tensors: list[TensorMoments] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """An adapter's weights at one moment."""

    manifest: common_pb2.AdapterManifest
    payload: memoryview


class Engine:
    """Holds the model. Every failure leaves adapters and gradients as they were before the call."""

    def __init__(self, device: torch.device, limits: Limits):
        """`device`: where model and adapters live; float32 on a CPU, bfloat16 base weights on a GPU."""
        self.device = device
        self.limits = limits
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.data_type = next(wire for wire, dtype in TORCH_DTYPES.items() if dtype == self.dtype)
        self.checkpoint: Checkpoint | None = None
        self._model: BaseModel | None = None
        self._adapters: dict[str, Adapter] = {}

    def load_base_model(self, checkpoint: Checkpoint, report: Callable[[str], None]) -> None:
        """Loads the base model; `report` is called with the name of each stage as it begins.

        FAILED_PRECONDITION when another model is loaded already.
        """
        if self.checkpoint is not None:
            if self.checkpoint.fingerprint == checkpoint.fingerprint:
                return
            raise errors.failed_precondition(
                "BASE_MODEL_LOADED",
                f"{self.checkpoint.name} is loaded, and a trainer holds one base model; start another trainer for "
                f"{checkpoint.name}",
                base_model=self.checkpoint.name,
            )
        loading.check_supported(checkpoint)
        # Imported late: Megatron takes ten seconds, in which the service answers health checks.
        from trainer_service.megatron.model import BaseModel  # noqa: PLC0415

        self._model = BaseModel(checkpoint, self.device, self.dtype, report)
        self.checkpoint = checkpoint

    def create_adapter(self, adapter_id: str, config: common_pb2.LoraConfig, seed: int) -> Adapter:
        """Makes an adapter with fresh weights. ALREADY_EXISTS, INVALID_ARGUMENT, NO_BASE_MODEL."""
        checkpoint = self._loaded()
        lora.check_adapter_id(adapter_id)
        if adapter_id in self._adapters:
            raise errors.already_exists(
                "ADAPTER_EXISTS",
                f"adapter {adapter_id!r} exists; remove it first or choose another name",
                adapter_id=adapter_id,
            )
        config = lora.normalized(config, self.limits.max_rank)
        shapes = lora.tensor_shapes(checkpoint, config.rank, config.target_modules)
        arena = Arena(config, shapes, checkpoint.config["num_hidden_layers"], seed, self.device)
        adapter = Adapter(adapter_id, config, seed, arena)
        self._adapters[adapter_id] = adapter
        return adapter

    def remove_adapter(self, adapter_id: str) -> None:
        """Frees an adapter. NOT_FOUND."""
        self._adapter(adapter_id)
        del self._adapters[adapter_id]

    def list_adapters(self) -> list[Adapter]:
        """The resident adapters in order of creation."""
        return list(self._adapters.values())

    def forward(self, adapter_id: str, data: Sequence[Datum], loss: Loss) -> PassResult:
        """Log-probabilities and loss without gradients; an empty `adapter_id` means the bare base model."""
        self._check(data)
        arena = self._adapter(adapter_id).arena if adapter_id else None
        with torch.no_grad():
            return self._run(arena, data, loss, lambda total: None)

    def forward_backward(self, adapter_id: str, data: Sequence[Datum], loss: Loss) -> PassResult:
        """As `forward`, and adds the gradient of the loss to the adapter's.

        FAILED_PRECONDITION when the loss is not finite; the gradient then stays what it was.
        """
        self._check(data)
        adapter = self._adapter(adapter_id)
        gradients = adapter.arena.gradients
        before = gradients.clone() if adapter.accumulated_calls else None
        try:
            result = self._run(adapter.arena, data, loss, torch.Tensor.backward)
            if not math.isfinite(result.metrics["loss:sum"]):
                raise errors.failed_precondition(
                    "LOSS_NOT_FINITE",
                    f"the loss of adapter {adapter_id!r} is {result.metrics['loss:sum']}; its weights have diverged, "
                    "remove it and train with a lower learning rate",
                    adapter_id=adapter_id,
                )
        except BaseException:
            gradients.copy_(before) if before is not None else gradients.zero_()
            raise
        adapter.accumulated_calls += 1
        return result

    def optim_step(self, adapter_id: str, params: AdamParams) -> StepResult:
        """Applies the accumulated gradient and clears it.

        FAILED_PRECONDITION when there is none, or when its norm is not finite: it is then cleared and not applied.
        """
        adapter = self._adapter(adapter_id)
        if not adapter.accumulated_calls:
            raise errors.failed_precondition(
                "NO_GRADIENT",
                f"adapter {adapter_id!r} has no gradient since step {adapter.step}; call ForwardBackward first",
                adapter_id=adapter_id,
                step=adapter.step,
            )
        norm = adamw.step(adapter.arena, params, adapter.step + 1)
        adapter.arena.gradients.zero_()
        adapter.accumulated_calls = 0
        if not math.isfinite(norm):
            raise errors.failed_precondition(
                "GRADIENT_NOT_FINITE",
                f"the gradient norm of adapter {adapter_id!r} is {norm}; the gradient was discarded and step "
                f"{adapter.step + 1} not applied",
                adapter_id=adapter_id,
                step=adapter.step,
            )
        adapter.step += 1
        adapter.last_adam = params
        return StepResult(adapter.step, norm)

    def optimizer_state(self, adapter_id: str, *, tensors: bool = True) -> OptimizerState:
        """Describes an adapter's optimizer, with the norms of every tensor's moments if asked. NOT_FOUND."""
        adapter = self._adapter(adapter_id)
        arena = adapter.arena
        moments = [
            TensorMoments(
                name=name,
                shape=arena.shape(name),
                exp_avg_norm=float(arena.view(arena.exp_avg, name).norm()),
                exp_avg_sq_norm=float(arena.view(arena.exp_avg_sq, name).norm()),
            )
            for name in (arena.names if tensors else [])
        ]
        return OptimizerState(
            adapter_id=adapter_id,
            step=adapter.step,
            last_adam=adapter.last_adam,
            accumulated_calls=adapter.accumulated_calls,
            size_bytes=4 * arena.weights.nbytes,
            tensors=moments,
        )

    def optimizer_states(self) -> list[OptimizerState]:
        """Describes all optimizers in order of creation, without their tensors."""
        return [self.optimizer_state(adapter_id, tensors=False) for adapter_id in self._adapters]

    def snapshot(self, adapter_id: str, dtype: common_pb2.DataType) -> Snapshot:
        """Copies the weights under their PEFT names, as float32 or bfloat16. NOT_FOUND, INVALID_ARGUMENT."""
        arena = self._adapter(adapter_id).arena
        if dtype not in TORCH_DTYPES:
            raise errors.invalid_argument(
                "DATA_TYPE_UNSUPPORTED",
                f"dtype {dtype} is not one of DATA_TYPE_FLOAT32 and DATA_TYPE_BFLOAT16",
                field="dtype",
            )
        manifest = payload.build_manifest(
            self._adapter(adapter_id).config,
            ((name, arena.shape(name)) for name in arena.names),
            dtype,
            self._loaded().fingerprint,
        )
        weights = arena.weights.to(TORCH_DTYPES[dtype])
        # Payload order is not arena order, which keeps the As of a fused layer side by side.
        flat = torch.cat([arena.view(weights, name).reshape(-1) for name in arena.names]).cpu()
        content = memoryview(flat.view(torch.uint8).numpy())
        manifest.digest = payload.digest(manifest, content)
        return Snapshot(manifest, content)

    def _run(
        self, arena: Arena | None, data: Sequence[Datum], loss: Loss, differentiate: Callable[[torch.Tensor], None]
    ) -> PassResult:
        assert self._model is not None
        logprobs: list[np.ndarray] = []
        loss_sum = 0.0
        for pass_data in batch.microbatches(data, self.limits.max_pass_tokens):
            lengths = [len(datum.tokens) for datum in pass_data]
            weights = torch.from_numpy(np.concatenate([datum.weights for datum in pass_data])).to(self.device)
            packed = self._model.token_logprobs(
                [Segment(arena, sum(lengths))],
                [datum.tokens for datum in pass_data],
                [datum.target_tokens for datum in pass_data],
            )
            total = LOSSES[loss](packed, weights)
            differentiate(total)
            loss_sum += float(total.detach())
            logprobs += [part.numpy() for part in packed.detach().cpu().split(lengths)]
        weights_sum = float(sum(datum.weights.sum(dtype=np.float64) for datum in data))
        metrics = {
            "loss:sum": loss_sum,
            "weights:sum": weights_sum,
            "tokens:sum": float(sum(len(datum.tokens) for datum in data)),
        }
        if weights_sum:
            metrics["loss:mean"] = loss_sum / weights_sum
        return PassResult(logprobs, metrics)

    def _check(self, data: Sequence[Datum]) -> None:
        checkpoint = self._loaded()
        batch.check(data, checkpoint.vocab_size, checkpoint.max_sequence_length, self.limits.max_batch_tokens)

    def _adapter(self, adapter_id: str) -> Adapter:
        try:
            return self._adapters[adapter_id]
        except KeyError:
            raise adapter_not_found(adapter_id, self._adapters) from None

    def _loaded(self) -> Checkpoint:
        if self.checkpoint is None:
            raise errors.failed_precondition(
                "NO_BASE_MODEL", "no base model is loaded; call InitializeBaseModel or start the trainer with --model"
            )
        return self.checkpoint


def adapter_not_found(adapter_id: str, existing: Sequence[str] | dict[str, Adapter]) -> errors.ServiceError:
    """NOT_FOUND that lists what exists."""
    return errors.not_found(
        "ADAPTER_NOT_FOUND",
        f"there is no adapter {adapter_id!r}; there are {sorted(existing)}",
        adapter_id=adapter_id,
    )
