"""An adapter's weights added to the base model's: a Hugging Face folder that needs no PEFT."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinkerbell import peft_folder, safetensors_file, tensors
from tinkerbell._new_folder import new_folder
from tinkerbell.lora import peft_name, split_name
from tinkerbell.safetensors_file import StoredTensor

Progress = Callable[[int, int], None]
"""Hears of the bytes written so far and of their total."""

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# The base model's weights, in this format and in others: they are not the merged ones.
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
_COPY_BYTES = 16 << 20


def merge(base: Path, adapter: Path, out: Path, on_progress: Progress | None = None) -> None:
    """Makes the folder `out`: the Hugging Face checkpoint `base` with the adapter of the PEFT folder `adapter` in it.

    W + scale * B A is computed in float32 and rounded to W's dtype, to nearest even; all else is copied. Memory holds
    the adapter and one of the base model's tensors. `out` is there whole or not at all.

    ValueError, before anything is written, when the base model can't be read or is not the adapter's; FileExistsError
    when there is something at `out`.
    """
    headers = {file: safetensors_file.read_header(file) for file in _weight_files(base)}
    stored = {name: tensor for header in headers.values() for name, tensor in header.tensors.items()}
    updates = _updates(adapter)
    for name, update in updates.items():
        update.check_fits(name, stored.get(name), base)
    _check_fingerprint(base, peft_folder.base_model_fingerprint(adapter))

    written, total = 0, sum(tensor.size for tensor in stored.values())
    with new_folder(out) as temporary:
        shutil.copytree(base, temporary, ignore=shutil.ignore_patterns(*_WEIGHT_FILES, ".*"), dirs_exist_ok=True)
        for file, header in headers.items():
            with file.open("rb") as source, (temporary / file.name).open("wb") as target:
                # Names, dtypes and shapes stay, so the header does.
                target.write(source.read(header.size))
                for name, tensor in header.tensors.items():
                    if name in updates:
                        target.write(updates[name].merged(tensor))
                    else:
                        _copy(source, tensor, target)
                    written += tensor.size
                    if on_progress:
                        on_progress(written, total)


class _Update:
    """What the weight of one linear layer gets."""

    def __init__(self, scale: float, a: np.ndarray, b: np.ndarray):
        self._scale = np.float32(scale)
        self._a = a
        self._b = b

    def check_fits(self, name: str, weight: StoredTensor | None, base: Path) -> None:
        shape = len(self._b), self._a.shape[1]
        if weight is None:
            raise ValueError(f"{base} has no tensor {name!r}, which the adapter changes; give the adapter's base model")
        if weight.shape != shape:
            raise ValueError(f"{name!r} has shape {list(weight.shape)} in {base} and {list(shape)} in the adapter")
        if weight.dtype not in safetensors_file.FLOAT_TYPES:
            raise ValueError(f"{name!r} is {weight.dtype} in {base}; give the base model before it was quantized")

    def merged(self, weight: StoredTensor) -> bytes:
        """The bytes of the new weight."""
        array = weight.read() + (self._b @ self._a) * self._scale
        return tensors.rounded(array, safetensors_file.FLOAT_TYPES[weight.dtype]).tobytes()


def _updates(adapter: Path) -> dict[str, _Update]:
    """By name of the base model's tensor."""
    lora, weights = peft_folder.read(adapter)
    paths = dict.fromkeys(split_name(name)[0] for name in weights)
    return {
        f"{path}.weight": _Update(lora.scale(path), weights[peft_name(path, "A")], weights[peft_name(path, "B")])
        for path in paths
    }


def _weight_files(base: Path) -> list[Path]:
    """The files that transformers would load."""
    if (base / _INDEX).exists():
        names = json.loads((base / _INDEX).read_text())["weight_map"].values()
        return [base / name for name in sorted(set(names))]
    if (base / _SINGLE_FILE).exists():
        return [base / _SINGLE_FILE]
    raise ValueError(f"{base} has neither {_SINGLE_FILE} nor {_INDEX}; save the model with save_pretrained")


def _check_fingerprint(base: Path, expected: str) -> None:
    found = safetensors_file.checkpoint_fingerprint(base)
    if expected and found != expected:
        raise ValueError(
            f"{base} has fingerprint {found[:12]}…, and the adapter belongs to a base model with {expected[:12]}…"
        )


def _copy(source: BinaryIO, tensor: StoredTensor, target: BinaryIO) -> None:
    source.seek(tensor.start)
    for begin in range(0, tensor.size, _COPY_BYTES):
        target.write(source.read(min(_COPY_BYTES, tensor.size - begin)))
