"""A Hugging Face checkpoint as both services see it, before any engine loads it."""

import functools
import json
import math
from pathlib import Path

import huggingface_hub

from service_common import errors
from service_common.errors import ServiceError
from tinkerbell import safetensors_file


class Checkpoint:
    """A folder with config.json and safetensors files."""

    def __init__(self, name: str, folder: Path):
        """Reads headers only. ServiceError when the folder is not such a checkpoint."""
        self.name = name
        self.folder = folder
        try:
            self.config: dict = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as cause:
            raise errors.invalid_argument(
                "MODEL_UNREADABLE",
                f"{folder} has no readable config.json ({cause}); give a Hugging Face checkpoint folder",
                model=name,
            ) from cause
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise errors.invalid_argument(
                "MODEL_UNREADABLE",
                f"{folder} has no .safetensors file; save the model with save_pretrained",
                model=name,
            )
        self._tensors: dict[str, safetensors_file.StoredTensor] = {}
        for file in files:
            self._tensors.update(safetensors_file.read_header(file).tensors)

    @property
    def architecture(self) -> str:
        """For example "LlamaForCausalLM"."""
        return self.config.get("architectures", ["unknown"])[0]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config["vocab_size"]

    @property
    def max_sequence_length(self) -> int:
        """Positions that the model was made for."""
        return self.config["max_position_embeddings"]

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        tied = self.config.get("tie_word_embeddings", False)
        return sum(
            math.prod(tensor.shape) for name, tensor in self._tensors.items() if not (tied and name == "lm_head.weight")
        )

    def linear_shape(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a linear layer by its Hugging Face path, None where the model has no such layer."""
        tensor = self._tensors.get(f"{module}.weight")
        return (tensor.shape[0], tensor.shape[1]) if tensor and len(tensor.shape) == 2 else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """See safetensors_file.fingerprint."""
        return safetensors_file.fingerprint(self._tensors)


def resolve(name: str) -> Checkpoint:
    """Finds a checkpoint by folder or hub name, downloading it in the latter case.

    ServiceError NOT_FOUND when it is neither, INVALID_ARGUMENT when it cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Checkpoint(name, folder)
    try:
        downloaded = huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
        )
    except ServiceError:
        raise
    except Exception as cause:  # the hub's client raises many unrelated types, for names and for networks
        raise errors.not_found(
            "MODEL_NOT_FOUND",
            f"{name!r} is neither a folder on this host nor a model the hub would give: {cause}",
            model=name,
        ) from cause
    return Checkpoint(name, Path(downloaded))
