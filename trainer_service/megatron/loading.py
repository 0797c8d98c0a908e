"""Loads a Hugging Face checkpoint into a frozen Megatron model and proves that nothing was left out."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from service_common import errors
from service_common.checkpoint import Checkpoint
from trainer_service.parallel import Place

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

# Families whose attention, norms and activations `layer_spec` expresses.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def check_supported(checkpoint: Checkpoint) -> None:
    """INVALID_ARGUMENT unless the trainer can hold this model."""
    if checkpoint.architecture not in ARCHITECTURES:
        raise errors.invalid_argument(
            "ARCHITECTURE_UNSUPPORTED",
            f"{checkpoint.name} is a {checkpoint.architecture}; the trainer loads {', '.join(ARCHITECTURES)}",
            field="model",
            architecture=checkpoint.architecture,
        )


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

    from trainer_service.megatron.layer_spec import layer_spec  # noqa: PLC0415

    bridge = AutoBridge.from_hf_pretrained(str(checkpoint.folder))
    provider = bridge.to_megatron_provider()
    provider.transformer_layer_spec = layer_spec
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, False
    provider.tensor_model_parallel_size = place.tensor.size
    provider.pipeline_model_parallel_size = place.pipeline.size
    provider.sequence_parallel = place.sequence_parallel
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
    provider.finalize()

    def before_loading(models: list[nn.Module]) -> list[nn.Module]:
        for parameter in models[0].parameters():
            nn.init.constant_(parameter, float("nan"))
        report("LOADING")
        return models

    provider.register_pre_wrap_hook(before_loading, prepend=True)
    (model,) = provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=device.type == "cpu", mixed_precision_wrapper=None
    )
    report("VERIFYING")
    _prove_complete(model, checkpoint, place)
    model.requires_grad_(False)
    return model.eval()


def _prove_complete(model: "GPTModel", checkpoint: Checkpoint, place: Place) -> None:
    unwritten = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    # A tied output layer on a stage of its own is a copy of the embedding on the first stage.
    copied = "output_layer.weight" if model.share_embeddings_and_output_weights else None
    placed = sum(
        parameter.numel() * (place.tensor.size if getattr(parameter, "tensor_model_parallel", False) else 1)
        for name, parameter in model.named_parameters()
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
