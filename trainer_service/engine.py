"""The engine: one frozen base model and the adapters. Synchronous, and used by one thread at a time.

Every rank has one and executes the same calls in the same order; each holds its part of the model and of every adapter.
What the ranks must decide alike, they decide from the same facts: the arguments, and sums over all ranks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed

from service_common import errors, lora
from service_common.checkpoint import Checkpoint
from service_common.errors import ServiceError
from tinkerbell import payload
from tinkerbell.v1 import common_pb2
from trainer_service import adamw, passes, snapshot
from trainer_service.adamw import AdamParams
from trainer_service.lora.arena import Arena
from trainer_service.megatron import loading
from trainer_service.parallel import Layout, Place
from trainer_service.passes import Part, PartResult
from trainer_service.ranks import may_take
from trainer_service.residency import Residency
from trainer_service.snapshot import Snapshot

if TYPE_CHECKING:
    from trainer_service.megatron.model import BaseModel

TORCH_DTYPES = {common_pb2.DATA_TYPE_FLOAT32: torch.float32, common_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16}
_LOAD_SECONDS = 3600.0  # a 70B checkpoint from a slow disk


@dataclass(frozen=True)
class Limits:
    """What the engine accepts."""

    max_rank: int = 64
    # Tokens in one request, and in one pass through the model. Activations of a pass take memory, a request does not.
    max_batch_tokens: int = 65536
    max_pass_tokens: int = 4096
    # Adapters that exist, and those of them that the device's memory holds.
    max_adapters: int = 1024
    max_resident_adapters: int = 64


@dataclass
class Adapter:
    """An adapter and how far it is."""

    adapter_id: str
    config: common_pb2.LoraConfig
    seed: int
    arena: Arena
    step: int = 0
    accumulated_calls: int = 0
    last_adam: AdamParams | None = None
    # A ForwardBackward is under way that has had one of several passes; and the gradient before it, None for zero.
    in_call: bool = False
    gradients_before: torch.Tensor | None = None
    _manifests: dict[common_pb2.DataType, common_pb2.AdapterManifest] = field(default_factory=dict)

    @property
    def info(self) -> "AdapterInfo":
        """What can be said of it."""
        return AdapterInfo(
            adapter_id=self.adapter_id,
            config=self.config,
            seed=self.seed,
            num_parameters=self.arena.num_parameters,
            step=self.step,
            resident=self.arena.resident,
        )

    def manifest(self, dtype: common_pb2.DataType, base_model: str) -> common_pb2.AdapterManifest:
        """Of the adapter in this dtype, without a digest. `base_model`: its fingerprint."""
        if dtype not in self._manifests:
            shapes = [(name, self.arena.shape(name)) for name in self.arena.names]
            self._manifests[dtype] = payload.build_manifest(self.config, shapes, dtype, base_model)
        manifest = common_pb2.AdapterManifest()
        manifest.CopyFrom(self._manifests[dtype])
        return manifest

    def begin_call(self) -> None:
        """Before each pass of a ForwardBackward; the first one counts."""
        if not self.in_call:
            self.gradients_before = self.arena.gradients.clone() if self.accumulated_calls else None
            self.in_call = True

    def commit_call(self) -> None:
        """After its last pass."""
        self.in_call, self.gradients_before = False, None
        self.accumulated_calls += 1

    def abandon_call(self) -> None:
        """Takes the gradient back to where it was, if a pass has begun."""
        if self.in_call:
            self.arena.reset_gradients(self.gradients_before)
        self.in_call, self.gradients_before = False, None


@dataclass(frozen=True)
class StepResult:
    """Steps applied so far and the gradient's L2 norm before clipping."""

    step: int
    grad_norm: float


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter, described."""

    adapter_id: str
    config: common_pb2.LoraConfig
    seed: int
    num_parameters: int
    step: int
    resident: bool


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
class Tensors:
    """Whole float32 tensors by PEFT name: the weights, and the moments unless the optimizer starts anew."""

    weights: Mapping[str, np.ndarray]
    exp_avg: Mapping[str, np.ndarray] | None = None
    exp_avg_sq: Mapping[str, np.ndarray] | None = None


class Engine:
    """Holds the model. Every failure leaves adapters and gradients as they were before the call."""

    def __init__(
        self,
        device: torch.device,
        limits: Limits,
        layout: Layout = Layout(),  # noqa: B008  (frozen)
        recompute_activations: bool = False,
    ):
        """`device`: where model and adapters live; float32 on a CPU, bfloat16 base weights on a GPU.

        `recompute_activations`: keep only the inputs of decoder layers for the backward pass, and run each layer again
        there: a third more arithmetic, a small part of the memory.
        """
        self.device = device
        self._recompute_activations = recompute_activations
        self.limits = limits
        self.layout = layout
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.data_type = next(wire for wire, dtype in TORCH_DTYPES.items() if dtype == self.dtype)
        self.checkpoint: Checkpoint | None = None
        self._model: BaseModel | None = None
        self._place = Place()
        self._adapters: dict[str, Adapter] = {}
        self._residency = Residency(limits.max_resident_adapters)

    @may_take(_LOAD_SECONDS)
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
        from trainer_service.megatron import runtime  # noqa: PLC0415

        self._place = runtime.initialize(self.device, self.layout)
        from trainer_service.megatron.model import BaseModel  # noqa: PLC0415

        self._model = BaseModel(checkpoint, self.device, self.dtype, self._place, report, self._recompute_activations)
        self.checkpoint = checkpoint

    def create_adapter(
        self,
        adapter_id: str,
        config: common_pb2.LoraConfig,
        seed: int,
        tensors: Tensors | None = None,
        step: int = 0,
        last_adam: AdamParams | None = None,
    ) -> AdapterInfo:
        """Makes an adapter with fresh weights, or with those of a checkpoint or an import.

        ALREADY_EXISTS, INVALID_ARGUMENT, NO_BASE_MODEL, RESOURCE_EXHAUSTED.
        """
        checkpoint, model = self._loaded()
        lora.check_adapter_id(adapter_id)
        if adapter_id in self._adapters:
            raise errors.already_exists(
                "ADAPTER_EXISTS",
                f"adapter {adapter_id!r} exists; remove it first or choose another name",
                adapter_id=adapter_id,
            )
        if len(self._adapters) >= self.limits.max_adapters:
            raise errors.resource_exhausted(
                "TOO_MANY_ADAPTERS",
                f"this trainer holds {len(self._adapters)} adapters, its maximum; remove one that is not needed, or "
                "start the trainer with a larger --max-adapters",
                scope="trainer",
                max_adapters=self.limits.max_adapters,
            )
        if not config.target_modules:
            config = common_pb2.LoraConfig.FromString(config.SerializeToString())
            config.target_modules.extend(lora.adaptable_modules(checkpoint))
        config = lora.normalized(config, self.limits.max_rank)
        shapes = dict(lora.tensor_shapes(checkpoint, config))
        if tensors is not None:
            _check_shapes(tensors.weights, shapes, adapter_id)
        self._residency.make_room()
        arena = Arena(config, shapes.items(), model.shard, seed, self.device)
        adapter = Adapter(adapter_id, config, seed, arena, step=step, last_adam=last_adam)
        if tensors is not None:
            _load(arena, tensors)
        self._adapters[adapter_id] = adapter
        self._residency.add(arena)
        return adapter.info

    def replace_weights(
        self, adapter_id: str, tensors: Tensors, step: int = 0, last_adam: AdamParams | None = None
    ) -> AdapterInfo:
        """Takes an adapter to other tensors of the same shapes; accumulated gradients go.

        NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION in the middle of a ForwardBackward.

        Moments that `tensors` does not have start anew.
        """
        adapter = self._adapter(adapter_id)
        arena = adapter.arena
        _check_between_calls(adapter)
        _check_shapes(tensors.weights, {name: arena.shape(name) for name in arena.names}, adapter_id)
        self._residency.use([arena])
        _load(arena, tensors)
        arena.gradients.zero_()
        adapter.accumulated_calls = 0
        adapter.step, adapter.last_adam = step, last_adam
        return adapter.info

    def remove_adapter(self, adapter_id: str) -> None:
        """Frees an adapter. NOT_FOUND."""
        self._residency.remove(self._adapter(adapter_id).arena)
        del self._adapters[adapter_id]

    def info(self, adapter_id: str) -> AdapterInfo:
        """Of one adapter. NOT_FOUND."""
        return self._adapter(adapter_id).info

    def list_adapters(self) -> list[AdapterInfo]:
        """All adapters in order of creation."""
        return [adapter.info for adapter in self._adapters.values()]

    def run_pass(self, parts: Sequence[Part]) -> list[PartResult]:
        """One pass of the model over the data of many adapters, each with its own loss.

        The parts are checked: adapters exist, data fit the model and the loss. Parts of one adapter follow each other.
        A loss that is not finite is that part's refusal (LOSS_NOT_FINITE), and changes nothing in the others' results.
        """
        _, model = self._loaded()
        training = [
            self._adapters[part.adapter_id] for part in parts if part.backward and part.adapter_id in self._adapters
        ]
        try:
            adapters = [self._adapter(part.adapter_id) if part.adapter_id else None for part in parts]
            arenas = [adapter.arena if adapter else None for adapter in adapters]
            self._residency.use([arena for arena in arenas if arena])
            for trained in training:
                trained.begin_call()
            results = passes.run(model, self._place, self.device, parts, arenas)
        except BaseException:
            for trained in training:
                trained.abandon_call()
            raise
        for adapter, part, result in zip(adapters, parts, results, strict=True):
            if adapter and part.backward and result.refusal:
                adapter.abandon_call()
            elif adapter and part.backward and part.is_last:
                adapter.commit_call()
        return results

    def optim_step(self, adapter_id: str, params: AdamParams) -> StepResult:
        """Applies the accumulated gradient and clears it.

        FAILED_PRECONDITION when there is none, or when its norm is not finite: it is then cleared and not applied.
        """
        adapter = self._adapter(adapter_id)
        _check_between_calls(adapter)
        if not adapter.accumulated_calls:
            raise errors.failed_precondition(
                "NO_GRADIENT",
                f"adapter {adapter_id!r} has no gradient since step {adapter.step}; call ForwardBackward first",
                adapter_id=adapter_id,
                step=adapter.step,
            )
        arena = adapter.arena
        self._residency.use([arena])
        norm = self._sum_gradients(arena)
        if math.isfinite(norm):
            adamw.step(arena, params, adapter.step + 1, norm)
        arena.gradients.zero_()
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
        moments = []
        if tensors:
            self._residency.use([arena])
            first, second = (_named(arena, self._gather(arena, buffer)) for buffer in (arena.exp_avg, arena.exp_avg_sq))
            moments = [
                TensorMoments(
                    name=name,
                    shape=arena.shape(name),
                    exp_avg_norm=float(np.linalg.norm(first[name])),
                    exp_avg_sq_norm=float(np.linalg.norm(second[name])),
                )
                for name in arena.names
            ]
        return OptimizerState(
            adapter_id=adapter_id,
            step=adapter.step,
            last_adam=adapter.last_adam,
            accumulated_calls=adapter.accumulated_calls,
            size_bytes=4 * 4 * arena.num_parameters,
            tensors=moments,
        )

    def optimizer_states(self) -> list[OptimizerState]:
        """Describes all optimizers in order of creation, without their tensors."""
        return [self.optimizer_state(adapter_id, tensors=False) for adapter_id in self._adapters]

    def snapshot(
        self, adapter_id: str, dtype: common_pb2.DataType, stage: Callable[[torch.Tensor], None] | None = None
    ) -> Snapshot:
        """Copies the weights under their PEFT names, as float32 or bfloat16. NOT_FOUND, INVALID_ARGUMENT.

        `stage` is called with the payload on the device, of that dtype, and must have copied what it wants when the
        work that is on the current stream then is done, which it is when this returns.
        """
        adapter = self._adapter(adapter_id)
        if dtype not in TORCH_DTYPES:
            raise errors.invalid_argument(
                "DATA_TYPE_UNSUPPORTED",
                f"dtype {dtype} is not one of DATA_TYPE_FLOAT32 and DATA_TYPE_BFLOAT16",
                field="dtype",
            )
        self._residency.use([adapter.arena])
        return self._pack(adapter, adapter.arena.weights, dtype, stage)

    def moments(self, adapter_id: str) -> tuple[Snapshot, Snapshot]:
        """Copies both AdamW moments, float32, under the PEFT names of the weights they belong to. NOT_FOUND."""
        adapter = self._adapter(adapter_id)
        arena = adapter.arena
        self._residency.use([arena])
        first, second = (
            self._pack(adapter, buffer, common_pb2.DATA_TYPE_FLOAT32) for buffer in (arena.exp_avg, arena.exp_avg_sq)
        )
        return first, second

    def tensors(self, adapter_id: str) -> Tensors:
        """Copies weights and moments. NOT_FOUND."""
        arena = self._adapter(adapter_id).arena
        self._residency.use([arena])
        return Tensors(
            *(_named(arena, self._gather(arena, buffer)) for buffer in (arena.weights, arena.exp_avg, arena.exp_avg_sq))
        )

    def _sum_gradients(self, arena: Arena) -> float:
        """Adds the gradients of all ranks up; returns their L2 norm."""
        place = self._place
        if place.sequence_parallel:
            distributed.all_reduce(arena.copies(arena.gradients), group=place.tensor.group)
        if place.data.size > 1:
            distributed.all_reduce(arena.gradients, group=place.data.group)
        square = torch.linalg.vector_norm(arena.own(arena.gradients)).double() ** 2
        if place.model.size > 1:
            distributed.all_reduce(square, group=place.model.group)
        return math.sqrt(square) if torch.isfinite(square) else float(square)

    def _gather(self, arena: Arena, buffer: torch.Tensor) -> torch.Tensor:
        """One of the arena's buffers, or a copy of it in another dtype, whole and in payload order, on all ranks.

        [num_parameters]. It may be the buffer itself.
        """
        whole = arena.whole(buffer)
        if self._place.model.size > 1:
            distributed.all_reduce(whole, group=self._place.model.group)
        return whole

    def _pack(
        self,
        adapter: Adapter,
        buffer: torch.Tensor,
        dtype: common_pb2.DataType,
        stage: Callable[[torch.Tensor], None] | None = None,
    ) -> Snapshot:
        manifest = adapter.manifest(dtype, self._loaded()[0].fingerprint)
        content = self._gather(adapter.arena, buffer.to(TORCH_DTYPES[dtype], copy=True))
        if stage:
            stage(content)
        return snapshot.take(manifest, content, adapter.step)

    def _adapter(self, adapter_id: str) -> Adapter:
        try:
            return self._adapters[adapter_id]
        except KeyError:
            raise adapter_not_found(adapter_id, self._adapters) from None

    def _loaded(self) -> "tuple[Checkpoint, BaseModel]":
        if self.checkpoint is None or self._model is None:
            raise no_base_model()
        return self.checkpoint, self._model


def _check_between_calls(adapter: Adapter) -> None:
    if adapter.in_call:
        raise errors.failed_precondition(
            "FORWARD_BACKWARD_RUNNING",
            f"a ForwardBackward of adapter {adapter.adapter_id!r} is half done; number the operations, or wait for its "
            "answer first",
            adapter_id=adapter.adapter_id,
        )


def no_base_model() -> ServiceError:
    """FAILED_PRECONDITION that says how to get one."""
    return errors.failed_precondition(
        "NO_BASE_MODEL", "no base model is loaded; call InitializeBaseModel or start the trainer with --model"
    )


def adapter_not_found(adapter_id: str, existing: Iterable[str]) -> ServiceError:
    """NOT_FOUND that says what exists."""
    return errors.not_found(
        "ADAPTER_NOT_FOUND",
        f"there is no adapter {adapter_id!r}; there are: {errors.listed(existing)}",
        adapter_id=adapter_id,
    )


def _check_shapes(weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], adapter_id: str) -> None:
    for name in [*shapes, *weights]:
        have = weights[name].shape if name in weights else None
        if have != shapes.get(name):
            raise errors.invalid_argument(
                "TENSOR_SHAPE_MISMATCH",
                f"adapter {adapter_id!r} has {name!r} with shape {shapes.get(name)}, and what is loaded has {have}; "
                "rank, rank_pattern and target_modules must be the same",
                tensor=name,
            )


def _load(arena: Arena, tensors: Tensors) -> None:
    arena.load(arena.weights, tensors.weights)
    for buffer, values in ((arena.exp_avg, tensors.exp_avg), (arena.exp_avg_sq, tensors.exp_avg_sq)):
        if values is None:
            buffer.zero_()
        else:
            arena.load(buffer, values)


def _named(arena: Arena, flat: torch.Tensor) -> dict[str, np.ndarray]:
    """Cuts what `_gather` returns into tensors by name."""
    sizes = [math.prod(arena.shape(name)) for name in arena.names]
    parts = flat.to("cpu", copy=True).split(sizes)
    return {name: part.view(arena.shape(name)).numpy() for name, part in zip(arena.names, parts, strict=True)}
