"""Loads a Hugging Face checkpoint into a frozen Megatron model and proves that nothing was left out."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from service_common import errors
from service_common.checkpoint import Checkpoint
from trainer_service.megatron.families import FAMILIES, Family
from trainer_service.parallel import Place

if TYPE_CHECKING:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.core.models.gpt import GPTModel
    from transformers import PretrainedConfig


def check_supported(checkpoint: Checkpoint) -> None:
    """INVALID_ARGUMENT unless the trainer can hold this model."""
    if checkpoint.architecture not in FAMILIES:
        raise _unsupported(checkpoint, f"the trainer loads {', '.join(FAMILIES)}")


def check_divisible(checkpoint: Checkpoint, place: Place) -> None:
    """INVALID_ARGUMENT unless the ranks can share this model evenly."""
    config = checkpoint.config
    shared = {
        "num_attention_heads": place.tensor.size,
        "num_key_value_heads": place.tensor.size,
        "intermediate_size": place.tensor.size,
        "vocab_size": place.tensor.size,
        "num_hidden_layers": place.pipeline.size,
    }
    for name, ranks in shared.items():
        if config.get(name, 0) % ranks:
            raise errors.invalid_argument(
                "LAYOUT_INVALID",
                f"{checkpoint.name} has {name} {config[name]}, which {ranks} ranks cannot share evenly",
                field="model",
                **{name: config[name]},
                ranks=ranks,
            )


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, place: Place, report: Callable[[str], None]
) -> "GPTModel":
    """A frozen GPTModel with the checkpoint's weights; this rank's part of it.

    `report` is called with "BUILDING", "LOADING" and "VERIFYING" as these steps begin. ServiceError when a parameter
    was not written or a tensor of the checkpoint found no place: Bridge only warns and goes on.
    """
    report("BUILDING")
    from megatron.bridge import AutoBridge  # noqa: PLC0415  (takes ten seconds)
    from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: PLC0415
    from megatron.core.transformer.enums import AttnBackend  # noqa: PLC0415

    family = FAMILIES[checkpoint.architecture]
    bridge = AutoBridge.from_hf_pretrained(str(checkpoint.folder))
    config = bridge.hf_pretrained.config
    _check_expressible(checkpoint, config, family)
    provider = bridge.to_megatron_provider()
    if getattr(provider, "multi_latent_attention", False):
        raise _unsupported(checkpoint, "adapters have no target modules for its multi-head latent attention")
    frequencies = _scaled_frequencies(config, family)
    _fit(provider, config, family)
    if frequencies is not None:
        provider.position_embedding_type = "rope"
        provider.rope_scaling, provider.seq_len_interpolation_factor = False, None
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, False
    provider.tensor_model_parallel_size = place.tensor.size
    provider.pipeline_model_parallel_size = place.pipeline.size
    provider.sequence_parallel = place.sequence_parallel
    # A choice among Transformer Engine's kernels, left in the environment for the process's next model to trip over.
    provider.attention_backend = AttnBackend.auto
    # These need Transformer Engine, Apex or a compiler, or only pay when base weights are trained.
    for fusion in (
        "gradient_accumulation_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion",
        "masked_softmax_fusion",
        "cross_entropy_loss_fusion",
        "persist_layer_norm",
    ):
        setattr(provider, fusion, False)
    provider.attention_dropout = provider.hidden_dropout = 0.0
    _check_tensor_parallel(checkpoint, family, provider)
    provider.finalize()

    def before_loading(models: list[nn.Module]) -> list[nn.Module]:
        tensors = _loaded_tensors(models[0])
        _check_mapped(tensors, bridge, checkpoint)
        for tensor in tensors.values():
            nn.init.constant_(tensor, float("nan"))
        if frequencies is not None:
            models[0].get_submodule("rotary_pos_emb").inv_freq = frequencies.to(device)
        report("LOADING")
        return models

    provider.register_pre_wrap_hook(before_loading, prepend=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Without it Megatron does not make a tied output layer, on a stage of its own, equal to the embedding before they
    # are loaded, which would need CUDA. After loading Bridge does.
    groups.embd = None
    (model,) = provider.provide_distributed_model(
        wrap_with_ddp=False,
        use_cpu_initialization=device.type == "cpu",
        mixed_precision_wrapper=None,
        pg_collection=groups,
    )
    report("VERIFYING")
    _prove_complete(model, checkpoint, place)
    model.requires_grad_(False)
    return model.eval()


def _fit(provider: "GPTModelProvider", config: "PretrainedConfig", family: Family) -> None:
    """Puts our layers in place of Bridge's, which need Transformer Engine."""
    from trainer_service.megatron.layer_spec import decoder_spec  # noqa: PLC0415  (imports Megatron)

    windows = _windows(config)
    provider.transformer_layer_spec = partial(decoder_spec, family=family, windows=windows)
    # The layers know their windows; Megatron's single one would be the same for all.
    provider.window_size = None
    if family.rotary_only_in_windows and any(windows):
        provider.no_rope_freq = [int(window is None) for window in windows]
    if getattr(config, "query_pre_attn_scalar", None) is not None:
        provider.softmax_scale = config.query_pre_attn_scalar**-0.5
    if provider.num_moe_experts is not None:
        _isolate_tokens(provider)


def _isolate_tokens(provider: "GPTModelProvider") -> None:
    """Makes an expert's answer to a token depend on that token alone, and so no tenant's on another's.

    No auxiliary loss, no capacity beyond which tokens are dropped, no selection bias that follows the load.
    """
    provider.moe_router_load_balancing_type = "none"
    provider.moe_aux_loss_coeff = 0.0
    provider.moe_z_loss_coeff = None
    provider.moe_expert_capacity_factor = None
    provider.moe_router_bias_update_rate = 0.0
    provider.moe_input_jitter_eps = None
    # The other dispatchers, the fused router and the fused permutation need CUDA or Transformer Engine.
    provider.moe_token_dispatcher_type = "allgather"
    provider.moe_grouped_gemm = False
    provider.moe_permute_fusion = False
    provider.moe_router_fusion = False
    provider.moe_shared_expert_overlap = False


def _windows(config: "PretrainedConfig") -> list[int | None]:
    """How many keys a query sees in each layer, itself included; None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _scaled_frequencies(config: "PretrainedConfig", family: Family) -> torch.Tensor | None:
    """Inverse rotary frequencies as Hugging Face scales them for long contexts, None where it does not.

    Bridge leaves part of this out: of Llama 3's scaling it knows the constants of the published models only, and YaRN
    needs values that checkpoints leave at their defaults. YaRN's other half, larger scores, Megatron does itself.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415  (as slow as Bridge)

    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind == "default" or family.two_rotary_bases:
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies


def _check_expressible(checkpoint: Checkpoint, config: "PretrainedConfig", family: Family) -> None:
    """INVALID_ARGUMENT when a checkpoint of a supported family has a part that is not built here."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _unsupported(checkpoint, f"its {' and '.join(sorted(kinds))} layers are not softmax attention")
    for name, value in family.assumed.items():
        if getattr(config, name, value) != value:
            raise _unsupported(checkpoint, f"with {name}={getattr(config, name)} it is not built, only with {value}")
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = {part.get("rope_type", "default") for part in (rope.values() if family.two_rotary_bases else [rope])}
    known = {"default", "linear"} if family.two_rotary_bases else {"default", "linear", "llama3", "yarn"}
    if not scalings <= known:
        raise _unsupported(checkpoint, f"rotary embeddings scaled by {min(scalings - known)} are not built")
    extras = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]
    if extras:
        raise _unsupported(checkpoint, f"rotary embeddings with {extras[0]} are not built")


def _check_tensor_parallel(checkpoint: Checkpoint, family: Family, provider: "GPTModelProvider") -> None:
    if provider.tensor_model_parallel_size == 1:
        return
    if family.qk_norm_over_all_heads:
        raise _unsupported(checkpoint, "its norm over all heads needs them on one rank; use tensor parallel size 1")
    if provider.num_moe_experts is not None:
        raise _unsupported(checkpoint, "its experts are not shared among ranks yet; use tensor parallel size 1")


def _check_mapped(names: Iterable[str], bridge: "AutoBridge", checkpoint: Checkpoint) -> None:
    registry = bridge._model_bridge.mapping_registry()
    for name in names:
        if registry.megatron_to_hf_lookup(name) is None:
            raise _unsupported(checkpoint, f"Bridge does not know {name} in this family")


def _unsupported(checkpoint: Checkpoint, why: str) -> errors.ServiceError:
    return errors.invalid_argument(
        "ARCHITECTURE_UNSUPPORTED",
        f"{checkpoint.name} is a {checkpoint.architecture}; {why}",
        field="model",
        architecture=checkpoint.architecture,
    )


def _loaded_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint has to fill: all parameters, and buffers such as a router's selection bias."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def _prove_complete(model: "GPTModel", checkpoint: Checkpoint, place: Place) -> None:
    tensors = _loaded_tensors(model)
    unwritten = [name for name, tensor in tensors.items() if tensor.isnan().any()]
    # A tied output layer on a stage of its own is a copy of the embedding on the first stage.
    copied = "output_layer.weight" if model.share_embeddings_and_output_weights else None
    placed = sum(
        tensor.numel() * (place.tensor.size if getattr(tensor, "tensor_model_parallel", False) else 1)
        for name, tensor in tensors.items()
        if name != copied
    )
    if place.pipeline.size > 1:  # all ranks must come to the same conclusion
        stages: list = [None] * distributed.get_world_size()
        distributed.all_gather_object(stages, (place.pipeline.index, placed, unwritten), group=place.world)
        placed = sum({index: placed for index, placed, _ in stages}.values())
        unwritten = [name for *_, names in stages for name in names]
    if unwritten:
        raise errors.invalid_argument(
            "MODEL_INCOMPLETE",
            f"{len(unwritten)} parameters of {checkpoint.name} were not loaded or hold NaN, "
            f"the first is {unwritten[0]}",
            field="model",
            parameter=unwritten[0],
        )
    if placed != checkpoint.num_parameters:
        raise errors.invalid_argument(
            "MODEL_INCOMPLETE",
            f"{checkpoint.name} has {checkpoint.num_parameters} parameters, and the model built for it {placed}; "
            "its configuration has a part that the trainer does not build",
            field="model",
            checkpoint_parameters=checkpoint.num_parameters,
            model_parameters=placed,
        )
