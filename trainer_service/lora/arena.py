"""The memory of one adapter on one rank: four flat float32 buffers and named views into them.

Flat, because most of what is done to an adapter is done to all of it: one AdamW call, one norm, one clearing, one
all-reduce, one copy to host memory and back.

Of a layer that ranks share by output features (q, k, v, gate, up) each rank holds its rows of B and all of A; of one
that they share by input features (o, down) its columns of A and all of B. So any rank works with any number of ranks,
and what is sent between ranks is as narrow as the adapter's rank.
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from service_common import lora
from tinkerbell.v1 import common_pb2

# Megatron's linear layers and the Hugging Face layers that each of them fuses, in the order of its output.
FUSED_MODULES: dict[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}

_GRADIENTS = 1  # their place among the four buffers


@dataclass(frozen=True)
class Shard:
    """The part of a model that this rank holds: some of its layers, and of each layer one of `size` equal parts."""

    layers: range
    index: int = 0
    size: int = 1


@dataclass(frozen=True)
class Factor:
    """One matrix of an adapter and the place of its gradient: float32 views of the same shape."""

    weight: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class LinearAdapter:
    """What one adapter adds to one of Megatron's linear layers."""

    # The A of every adapted module, stacked: [sum(ranks), in_features]. One product serves all of them.
    a: Factor
    # Per adapted module, in FUSED_MODULES' order: its rank and its B [out_features, rank].
    ranks: list[int]
    b: dict[str, Factor]
    # Per adapted module: what its product is multiplied by.
    scales: list[float]


@dataclass(frozen=True)
class _Place:
    """Where this rank's part of a tensor lies: `offset` in the buffers, `part` in the whole tensor."""

    offset: int
    shape: tuple[int, int]
    part: tuple[slice, slice]


class Arena:
    """Weights, accumulated gradients and AdamW moments of one adapter."""

    def __init__(
        self,
        config: common_pb2.LoraConfig,
        shapes: Iterable[tuple[str, tuple[int, int]]],
        shard: Shard,
        seed: int,
        device: torch.device,
    ):
        """`config` with every field set; `shapes`, of whole tensors, as `service_common.lora.tensor_shapes` gives
        them for it.
        """
        self._shapes = dict(sorted(dict(shapes).items(), key=lambda item: not _is_shared(item[0])))
        self._shard = shard
        self._places: dict[str, _Place] = {}
        linears = self._lay_out(config)
        # Not one tensor: autograd would take a gradient's change for one of the weights.
        self._buffers = [torch.zeros(self._size, device=device) for _ in range(4)]
        self.weights, self.gradients, self.exp_avg, self.exp_avg_sq = self._buffers
        self._spilled: list[torch.Tensor] | None = None
        self._initialize(seed)
        self.linears = {key: self._linear_adapter(paths, config) for key, paths in linears.items()}

    @property
    def names(self) -> list[str]:
        """PEFT names of all tensors of the adapter, on whatever rank, in payload order.

        That is the order in the buffers of a rank that has all of them: by layer and module, first what ranks share.
        """
        return list(self._shapes)

    @functools.cached_property
    def num_parameters(self) -> int:
        """Elements of all tensors of the adapter, on whatever rank."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def resident(self) -> bool:
        """Whether the buffers are in the device's memory."""
        return self._spilled is None

    def shape(self, name: str) -> tuple[int, int]:
        """Shape of a whole tensor by its PEFT name."""
        return self._shapes[name]

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        """The part of one of the four buffers that belongs to a tensor: this rank's part of it, which may be empty."""
        place = self._places.get(name)
        if place is None:
            return buffer[:0].view(0, 0)
        return buffer[place.offset : place.offset + math.prod(place.shape)].view(place.shape)

    def copies(self, buffer: torch.Tensor) -> torch.Tensor:
        """The stretch of one of the four buffers of which every rank that shares a layer has the same."""
        return buffer[self._size - self._num_copies :]

    def own(self, buffer: torch.Tensor) -> torch.Tensor:
        """All but `copies` on other ranks than the first: over all ranks, each element of the adapter once."""
        return buffer if self._shard.index == 0 else buffer[: self._size - self._num_copies]

    def whole(self, buffer: torch.Tensor) -> torch.Tensor:
        """[num_parameters] in payload order, on the buffer's device: what `own` has, and zeros elsewhere.

        `buffer`: one of the four, or a copy in another dtype. The sum over the ranks that hold the model together is
        the whole adapter. A rank that has all of it returns the buffer itself.
        """
        if self._size == self.num_parameters:
            return buffer
        flat = buffer.new_zeros(self.num_parameters)
        # Strides by hand, as slicing would take four times as long.
        offset = 0
        for name, (rows, columns) in self._shapes.items():
            place = self._places.get(name)
            if place and (self._shard.index == 0 or place.offset < self._size - self._num_copies):
                first_row, first_column = (axis.start for axis in place.part)
                to = flat.as_strided(place.shape, (columns, 1), offset + first_row * columns + first_column)
                to.copy_(buffer.as_strided(place.shape, (place.shape[1], 1), place.offset))
            offset += rows * columns
        return flat

    def load(self, buffer: torch.Tensor, tensors: Mapping[str, np.ndarray]) -> None:
        """Fills one of the four buffers with this rank's part of whole float32 tensors, given by PEFT name."""
        for name, place in self._places.items():
            self.view(buffer, name).copy_(torch.from_numpy(np.ascontiguousarray(tensors[name][place.part])))

    def reset_gradients(self, before: torch.Tensor | None) -> None:
        """Takes the gradient back to a copy of it, or to zero, wherever it is."""
        gradients = self.gradients if self._spilled is None else self._spilled[_GRADIENTS]
        if before is None:
            gradients.zero_()
        else:
            gradients.copy_(before)

    def spill(self) -> None:
        """Moves the buffers to host memory, pinned where there is a GPU. Views stay valid but must not be used."""
        # All copies before anything goes: there may be no host memory left.
        spilled = [torch.empty(buffer.shape, pin_memory=buffer.is_cuda).copy_(buffer) for buffer in self._buffers]
        for buffer in self._buffers:
            buffer.untyped_storage().resize_(0)
        self._spilled = spilled

    def restore(self) -> None:
        """Moves the buffers back to where their views point."""
        assert self._spilled is not None
        for buffer, host in zip(self._buffers, self._spilled, strict=True):
            buffer.untyped_storage().resize_(host.nbytes)
            buffer.copy_(host)
        self._spilled = None

    def _lay_out(self, config: common_pb2.LoraConfig) -> dict[tuple[int, str], list[tuple[str, str]]]:
        """Gives every tensor of this rank its place in payload order, where the As of a fused layer are neighbours."""
        linears = {}
        for layer in self._shard.layers:
            for linear, fused in FUSED_MODULES.items():
                modules = [module for module in fused if module in config.target_modules]
                paths = [(module, lora.module_path(layer, module)) for module in modules]
                if paths:
                    linears[layer, linear] = paths
        here = {path for paths in linears.values() for _, path in paths}
        self._size = self._num_copies = 0
        for name in self._shapes:
            if lora.path_of(name) in here:
                size = self._place(name)
                self._num_copies += 0 if _is_shared(name) else size
                self._size += size
        return linears

    def _place(self, name: str) -> int:
        """Gives this rank's part of a tensor the place after the last one; returns its number of elements."""
        rows, columns = self._shapes[name]
        part = [slice(0, rows), slice(0, columns)]
        if _is_shared(name):
            axis = 1 if ".lora_A." in name else 0
            length = self._shapes[name][axis] // self._shard.size
            part[axis] = slice(self._shard.index * length, (self._shard.index + 1) * length)
        shape = (part[0].stop - part[0].start, part[1].stop - part[1].start)
        self._places[name] = _Place(self._size, shape, (part[0], part[1]))
        return math.prod(shape)

    def _linear_adapter(self, paths: list[tuple[str, str]], config: common_pb2.LoraConfig) -> LinearAdapter:
        first = self._places[lora.peft_name(paths[0][1], "A")]
        ranks = [lora.module_rank(config, path) for _, path in paths]
        return LinearAdapter(
            a=self._factor(_Place(first.offset, (sum(ranks), first.shape[1]), first.part)),
            ranks=ranks,
            b={module: self._factor(self._places[lora.peft_name(path, "B")]) for module, path in paths},
            scales=[lora.module_scale(config, path) for _, path in paths],
        )

    def _factor(self, place: _Place) -> Factor:
        stretch = slice(place.offset, place.offset + math.prod(place.shape))
        return Factor(self.weights[stretch].view(place.shape), self.gradients[stretch].view(place.shape))

    def _initialize(self, seed: int) -> None:
        """PEFT's initialisation: A uniform in +-1/sqrt(in_features), B zero.

        Whole tensors are drawn on the CPU from a generator each, so that the values depend on nothing but seed and
        name.
        """
        for name, place in self._places.items():
            if ".lora_A." in name:
                shape = self._shapes[name]
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
                bound = 1 / math.sqrt(shape[1])
                values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
                self.view(self.weights, name).copy_(values[place.part])


def _is_shared(name: str) -> bool:
    """Whether ranks that share the layer have parts of this tensor, by its PEFT name, rather than a copy each."""
    by_input = lora.path_of(name).endswith(("o_proj", "down_proj"))
    return by_input == (".lora_A." in name)
