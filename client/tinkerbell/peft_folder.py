"""Adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinkerbell import safetensors_file
from tinkerbell._new_folder import new_folder
from tinkerbell.lora import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_FINGERPRINT = "base_model_fingerprint"  # in the metadata of the weights

# Keys that say what the tensors say too, or how they came to be; and those whose defaults are not empty.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_SHAPE = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# The values that are possible, where not only an empty one is.
_POSSIBLE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others change the base model's weights too, unless PEFT converted the adapter when it saved it, which then
    # says so by True.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def read(folder: Path) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The adapter's shape, and its weights by PEFT name as float32, which is exact for float16 and bfloat16 too.

    ValueError, naming the key or the tensor, when it is more than LoRA on linear layers: DoRA, biases, trained
    embeddings or tokens, weights of the base model. OSError when a file is missing.
    """
    config = json.loads((folder / CONFIG).read_text())
    _check(config, folder / CONFIG)
    weights = {name: stored.read() for name, stored in safetensors_file.read_header(folder / WEIGHTS).tensors.items()}
    lora = LoraConfig.of_weights(
        weights,
        rank=config["r"],
        alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern"),
        alpha_pattern=config.get("alpha_pattern"),
    )
    return lora, weights


def base_model_fingerprint(folder: Path) -> str:
    """The base model that an exported adapter belongs to; empty when the folder is not Tinkerbell's."""
    return safetensors_file.read_header(folder / WEIGHTS).metadata.get(_FINGERPRINT, "")


def adapter_config(lora: LoraConfig, base_model: str) -> dict[str, Any]:
    """What PEFT expects in adapter_config.json; `base_model`: a folder or a hub name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.use_rslora,
        "target_modules": list(lora.target_modules),
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
    }


def write(
    folder: Path, lora: LoraConfig, weights: Mapping[str, np.ndarray], base_model: str, base_model_fingerprint: str
) -> None:
    """Makes the folder, which is there whole or not at all, for PeftModel.from_pretrained.

    `weights`: float32 by PEFT name. `base_model`: a folder or a hub name. FileExistsError when there is something at
    `folder`.
    """
    with new_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(adapter_config(lora, base_model), indent=2) + "\n")
        with (temporary / WEIGHTS).open("wb") as stream:
            safetensors_file.write(stream, weights, {"format": "pt", _FINGERPRINT: base_model_fingerprint})


def _check(config: Mapping[str, Any], file: Path) -> None:
    for key in ("peft_type", "r", "lora_alpha"):
        if key not in config:
            raise ValueError(f"{file} has no {key}")
    for key, value in config.items():
        if key in _WITHOUT_EFFECT or key in _SHAPE:
            continue
        possible = _POSSIBLE.get(key)
        if value not in possible if possible else value:
            only = f"; only {' and '.join(map(repr, possible))} can be imported" if possible else ""
            raise ValueError(f"{file} has {key} = {value!r}, which LoRA on linear layers does not have here{only}")
