"""The memory of one adapter: four flat float32 buffers and named views into them.

Flat, because most of what is done to an adapter is done to all of it: one AdamW call, one norm, one clearing, and later
one all-reduce or one copy to spill.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Factor:
    """One matrix of an adapter and the place of its gradient: float32 views of the same shape."""

    weight: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class LinearAdapter:
    """What one adapter adds to one of Megatron's linear layers."""

    rank: int
    scale: float
    # The A of every adapted module, stacked: [len(b) * rank, in_features]. One product serves all of them.
    a: Factor
    # Per adapted module, in FUSED_MODULES' order: [out_features, rank].
    b: dict[str, Factor]


class Arena:
    """Weights, accumulated gradients and AdamW moments of one adapter."""

    def __init__(
        self,
        config: common_pb2.LoraConfig,
        shapes: Iterable[tuple[str, tuple[int, int]]],
        num_layers: int,
        seed: int,
        device: torch.device,
    ):
        """`config` with every field set; `shapes` as `service_common.lora.tensor_shapes` gives them for it."""
        self._shapes = dict(shapes)
        self._offsets: dict[str, int] = {}
        self._size = 0
        self._linear_offsets = self._lay_out(config, num_layers)
        self.weights = torch.zeros(self._size, device=device)
        self.gradients = torch.zeros(self._size, device=device)
        self.exp_avg = torch.zeros(self._size, device=device)
        self.exp_avg_sq = torch.zeros(self._size, device=device)
        self._initialize(seed)
        scale = config.alpha / config.rank
        self.linears = {
            key: self._linear_adapter(names, config.rank, scale) for key, names in self._linear_offsets.items()
        }

    @property
    def names(self) -> list[str]:
        """PEFT names of all tensors in payload order."""
        return list(self._shapes)

    @property
    def num_parameters(self) -> int:
        """Elements in each of the four buffers."""
        return self._size

    def shape(self, name: str) -> tuple[int, int]:
        """Shape of a tensor by its PEFT name."""
        return self._shapes[name]

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        """The part of one of the four buffers that belongs to a tensor, in the tensor's shape."""
        return self._view(buffer, self._offsets[name], self._shapes[name])

    def _lay_out(self, config: common_pb2.LoraConfig, num_layers: int) -> dict[tuple[int, str], list[tuple[str, str]]]:
        """Gives every tensor its offset, the As of a fused layer side by side."""
        linears = {}
        for layer in range(num_layers):
            for linear, fused in FUSED_MODULES.items():
                modules = [module for module in fused if module in config.target_modules]
                paths = [(module, lora.module_path(layer, module)) for module in modules]
                for half in "AB":
                    for _, path in paths:
                        name = lora.peft_name(path, half)
                        self._offsets[name] = self._size
                        self._size += math.prod(self._shapes[name])
                if paths:
                    linears[layer, linear] = paths
        return linears

    def _linear_adapter(self, paths: list[tuple[str, str]], rank: int, scale: float) -> LinearAdapter:
        first = lora.peft_name(paths[0][1], "A")
        stacked = (len(paths) * rank, self._shapes[first][1])
        b_names = {module: lora.peft_name(path, "B") for module, path in paths}
        return LinearAdapter(
            rank=rank,
            scale=scale,
            a=self._factor(self._offsets[first], stacked),
            b={module: self._factor(self._offsets[name], self._shapes[name]) for module, name in b_names.items()},
        )

    def _factor(self, offset: int, shape: tuple[int, int]) -> Factor:
        return Factor(self._view(self.weights, offset, shape), self._view(self.gradients, offset, shape))

    @staticmethod
    def _view(buffer: torch.Tensor, offset: int, shape: tuple[int, int]) -> torch.Tensor:
        return buffer[offset : offset + math.prod(shape)].view(shape)

    def _initialize(self, seed: int) -> None:
        """PEFT's initialisation: A uniform in +-1/sqrt(in_features), B zero.

        Drawn on the CPU from a generator per tensor, so that the values depend on nothing but seed and name.
        """
        for name, shape in self._shapes.items():
            if ".lora_A." in name:
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
                bound = 1 / math.sqrt(shape[1])
                values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
                self.view(self.weights, name).copy_(values)
