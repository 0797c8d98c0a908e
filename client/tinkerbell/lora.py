"""The shape of a LoRA adapter, and the names of its tensors in PEFT."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinkerbell.v1 import common_pb2

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What else PEFT writes, by a part of its name.
_OTHER_TENSORS = {
    "lora_magnitude_vector": "it belongs to DoRA",
    "lora_embedding_": "embeddings are not adapted here",
    "modules_to_save": "the base model's own weights are not trained here",
    "token_adapter": "tokens are not trained here",
    "trainable_tokens": "tokens are not trained here",
    "bias": "there are no biases here",
    ".default.": "leave the adapter's name out, as PEFT's save_pretrained does",
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """W' = W + scale * B A (Hu et al., arXiv:2106.09685)."""

    rank: int
    """Rows of A and columns of B."""
    alpha: float
    """Numerator of the scale alpha / rank."""
    target_modules: tuple[str, ...]
    """The linear layers that are adapted, for example "q_proj"."""
    use_rslora: bool = False
    """The scale is alpha / sqrt(rank) (Kalajdzievski, arXiv:2312.03732)."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ranks of single modules that differ from `rank`, by full path, for example "model.layers.0.mlp.up_proj"."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Alphas of single modules that differ from `alpha`, likewise."""

    @classmethod
    def of_weights(
        cls,
        weights: Mapping[str, np.ndarray],
        rank: int,
        alpha: float,
        use_rslora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
    ) -> "LoraConfig":
        """The shape of an adapter whose tensors are there.

        `weights`: by PEFT name, A [rank, in] and B [out, rank]. The keys of the patterns are PEFT's: regular
        expressions, of which the first that matches a module's path or the end of it after a dot counts. ValueError,
        naming the tensor, when it is no LoRA tensor of a linear layer, lacks its other half or has another rank.
        """
        halves: dict[str, dict[str, np.ndarray]] = {}
        for name, array in weights.items():
            path, half = split_name(name)
            halves.setdefault(path, {})[half] = array
        if not halves:
            raise ValueError("the adapter has no tensors")
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for path, pair in halves.items():
            for half, other in ("AB", "BA"):
                if half not in pair:
                    raise ValueError(f"tensor {peft_name(path, other)!r} lacks its other half, lora_{half}")
            ranks[path] = _matching(rank_pattern or {}, path, rank)
            alphas[path] = _matching(alpha_pattern or {}, path, alpha)
            for half, axis in (("A", 0), ("B", 1)):
                shape = pair[half].shape
                if len(shape) != 2 or shape[axis] != ranks[path]:
                    wanted = "[rank, in]" if half == "A" else "[out, rank]"
                    raise ValueError(
                        f"tensor {peft_name(path, half)!r} has shape {list(shape)}; it must be {wanted} "
                        f"with rank {ranks[path]}"
                    )
        return cls(
            rank=rank,
            alpha=alpha,
            target_modules=tuple(dict.fromkeys(path.rpartition(".")[2] for path in halves)),
            use_rslora=use_rslora,
            rank_pattern={path: own for path, own in ranks.items() if own != rank},
            alpha_pattern={path: own for path, own in alphas.items() if own != alpha},
        )

    @classmethod
    def from_proto(cls, message: common_pb2.LoraConfig) -> "LoraConfig":
        """What a service says, which leaves nothing out."""
        return cls(
            rank=message.rank,
            alpha=message.alpha,
            target_modules=tuple(message.target_modules),
            use_rslora=message.use_rslora,
            rank_pattern=dict(message.rank_pattern),
            alpha_pattern=dict(message.alpha_pattern),
        )

    def to_proto(self) -> common_pb2.LoraConfig:
        """The message."""
        return common_pb2.LoraConfig(**dataclasses.asdict(self))

    def scale(self, path: str) -> float:
        """The factor of B A in the module at `path`."""
        rank = self.rank_pattern.get(path, self.rank)
        alpha = self.alpha_pattern.get(path, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def peft_name(path: str, half: str) -> str:
    """Name of a tensor in PEFT; `half` is "A" or "B"."""
    return f"base_model.model.{path}.lora_{half}.weight"


def split_name(name: str) -> tuple[str, str]:
    """Path and half of the tensor of that PEFT name. ValueError, naming it, when it is not a linear layer's LoRA."""
    match = _NAME.fullmatch(name)
    if match is None:
        why = next((why for part, why in _OTHER_TENSORS.items() if part in name), "no such tensor belongs to LoRA")
        raise ValueError(f"tensor {name!r} is not {peft_name('PATH', 'A')} or lora_B: {why}")
    return match[1], match[2]


def _matching(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    # As peft.utils.get_pattern_key finds it.
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
