"""Names and shapes of LoRA adapters, as PEFT has them, and the checks both services make."""

import math
import re
from collections.abc import Iterator

from service_common import errors
from service_common.checkpoint import Checkpoint
from tinkerbell import payload
from tinkerbell.v1 import common_pb2

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
TARGET_MODULES = ATTENTION_MODULES + MLP_MODULES
DEFAULT_ALPHA = 32.0

_ADAPTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_adapter_id(adapter_id: str) -> None:
    """INVALID_ARGUMENT unless the id is a plain name."""
    if not _ADAPTER_ID.fullmatch(adapter_id):
        raise errors.invalid_argument(
            "ADAPTER_ID_INVALID",
            f"adapter_id {adapter_id!r} must be 1 to 64 of [A-Za-z0-9._-], starting with a letter or digit",
            field="adapter_id",
            adapter_id=adapter_id,
        )


def normalized(config: common_pb2.LoraConfig, max_rank: int) -> common_pb2.LoraConfig:
    """A copy with defaults filled in and modules in canonical order; INVALID_ARGUMENT on a bad value."""
    if not 1 <= config.rank <= max_rank:
        raise errors.invalid_argument(
            "RANK_OUT_OF_RANGE",
            f"rank {config.rank} is not between 1 and {max_rank}, this service's maximum",
            field="lora.rank",
            rank=config.rank,
            max_rank=max_rank,
        )
    alpha = config.alpha if config.HasField("alpha") else DEFAULT_ALPHA
    if not (math.isfinite(alpha) and alpha > 0):
        raise errors.invalid_argument(
            "ALPHA_OUT_OF_RANGE", f"alpha {alpha} is not finite and above 0", field="lora.alpha", alpha=alpha
        )
    unknown = sorted(set(config.target_modules) - set(TARGET_MODULES))
    if unknown:
        raise errors.invalid_argument(
            "TARGET_MODULE_UNKNOWN",
            f"target_modules {unknown} are not among {list(TARGET_MODULES)}",
            field="lora.target_modules",
            target_modules=",".join(unknown),
        )
    for path, rank in config.rank_pattern.items():
        if not 1 <= rank <= max_rank:
            raise errors.invalid_argument(
                "RANK_OUT_OF_RANGE",
                f"rank {rank} of {path} is not between 1 and {max_rank}, this service's maximum",
                field=f"lora.rank_pattern[{path}]",
                rank=rank,
                max_rank=max_rank,
            )
    for path, alpha_of_path in config.alpha_pattern.items():
        if not (math.isfinite(alpha_of_path) and alpha_of_path > 0):
            raise errors.invalid_argument(
                "ALPHA_OUT_OF_RANGE",
                f"alpha {alpha_of_path} of {path} is not finite and above 0",
                field=f"lora.alpha_pattern[{path}]",
                alpha=alpha_of_path,
            )
    chosen = config.target_modules or TARGET_MODULES
    return common_pb2.LoraConfig(
        rank=config.rank,
        alpha=alpha,
        target_modules=[module for module in TARGET_MODULES if module in chosen],
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
    )


def module_rank(config: common_pb2.LoraConfig, path: str) -> int:
    """The rank of one module, by its Hugging Face path."""
    return config.rank_pattern.get(path, config.rank)


def module_scale(config: common_pb2.LoraConfig, path: str) -> float:
    """The factor of B A of one module, by its Hugging Face path."""
    rank = module_rank(config, path)
    return config.alpha_pattern.get(path, config.alpha) / (math.sqrt(rank) if config.use_rslora else rank)


def module_path(layer: int, module: str) -> str:
    """Hugging Face path, for example "model.layers.0.self_attn.q_proj"."""
    block = "self_attn" if module in ATTENTION_MODULES else "mlp"
    return f"model.layers.{layer}.{block}.{module}"


def peft_name(path: str, half: str) -> str:
    """Name of one of an adapter's tensors in PEFT; `half` is "A" or "B"."""
    return f"base_model.model.{path}.lora_{half}.weight"


def adaptable_modules(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The target modules that every layer of the model has. Experts have none."""
    layers = range(checkpoint.config["num_hidden_layers"])
    return tuple(
        module
        for module in TARGET_MODULES
        if all(checkpoint.linear_shape(module_path(layer, module)) for layer in layers)
    )


def path_of(name: str) -> str:
    """The Hugging Face path of the module that a tensor with this PEFT name belongs to."""
    return name.removeprefix("base_model.model.").rpartition(".lora_")[0]


def tensor_shapes(checkpoint: Checkpoint, config: common_pb2.LoraConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """(PEFT name, shape) of every tensor of such an adapter in payload order: by layer, module, A before B.

    INVALID_ARGUMENT when the model does not have what `config`, which is normalized, names.
    """
    unknown = {*config.rank_pattern, *config.alpha_pattern}
    for layer in range(checkpoint.config["num_hidden_layers"]):
        for module in config.target_modules:
            path = module_path(layer, module)
            unknown.discard(path)
            rank = module_rank(config, path)
            shape = checkpoint.linear_shape(path)
            if shape is None:
                raise errors.invalid_argument(
                    "TARGET_MODULE_UNKNOWN",
                    f"{checkpoint.name} has no linear layer {path}",
                    field="lora.target_modules",
                    target_modules=module,
                )
            out_features, in_features = shape
            yield peft_name(path, "A"), (rank, in_features)
            yield peft_name(path, "B"), (out_features, rank)
    if unknown:
        raise errors.invalid_argument(
            "TARGET_MODULE_UNKNOWN",
            f"rank_pattern or alpha_pattern names {min(unknown)!r}, which is no adapted linear layer of "
            f"{checkpoint.name}; give full paths such as {module_path(0, config.target_modules[0])!r}",
            field="lora.rank_pattern",
            target_modules=min(unknown),
        )


def check_manifest(manifest: common_pb2.AdapterManifest, checkpoint: Checkpoint, max_rank: int) -> None:
    """INVALID_ARGUMENT or FAILED_PRECONDITION, naming the culprit, unless the base model can carry the adapter.

    Any order of the tensors will do, but each expected one must be there, and no other.
    """
    if manifest.base_model_fingerprint != checkpoint.fingerprint:
        raise errors.failed_precondition(
            "BASE_MODEL_MISMATCH",
            f"the adapter belongs to base model {manifest.base_model_fingerprint[:12]}…, and this service holds "
            f"{checkpoint.name} with fingerprint {checkpoint.fingerprint[:12]}…; load the same base model in both",
            adapter_base_model=manifest.base_model_fingerprint,
            service_base_model=checkpoint.fingerprint,
        )
    config = normalized(manifest.lora, max_rank)
    try:
        payload.check_layout(manifest)
    except payload.PayloadError as cause:
        raise errors.invalid_argument("MANIFEST_INVALID", str(cause), field="manifest") from cause
    expected = dict(tensor_shapes(checkpoint, config))
    for spec in manifest.tensors:
        if spec.name not in expected:
            raise errors.invalid_argument(
                "TENSOR_UNEXPECTED",
                f"tensor {spec.name!r} does not belong to an adapter of {list(config.target_modules)} on "
                f"{checkpoint.name}",
                field="manifest.tensors",
                tensor=spec.name,
            )
        shape = expected.pop(spec.name)
        if tuple(spec.shape) != shape:
            raise errors.invalid_argument(
                "TENSOR_SHAPE_MISMATCH",
                f"tensor {spec.name!r} has shape {list(spec.shape)}, and the base model needs {list(shape)}",
                field="manifest.tensors",
                tensor=spec.name,
            )
    if expected:
        raise errors.invalid_argument(
            "TENSOR_MISSING",
            f"{len(expected)} tensors are missing, the first is {next(iter(expected))!r}",
            field="manifest.tensors",
            tensor=next(iter(expected)),
        )
