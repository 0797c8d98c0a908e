"""The model families that the trainer holds, and what sets each apart from Llama.

What a checkpoint's configuration says itself (norm epsilon, sliding windows, number of experts, ...) does not stand
here. docs/models.md has the table of everything that was tried; scripts/model_table.py makes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Family:
    """How a family's decoder layers are built."""

    # Where a layer normalises, seen from its attention and its MLP.
    norms: Literal["before", "after", "around"] = "before"
    # One q/k norm over all heads together, instead of one over each head.
    qk_norm_over_all_heads: bool = False
    # Layers with a sliding window and layers without have rotary embeddings of different base.
    two_rotary_bases: bool = False
    # In models with sliding windows, the layers without one have no rotary embedding.
    rotary_only_in_windows: bool = False
    # Values that Bridge takes for granted in the checkpoint's configuration.
    assumed: Mapping[str, object] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "GemmaForCausalLM": Family(),
    "Gemma2ForCausalLM": Family(norms="around"),
    "Gemma3ForCausalLM": Family(norms="around", two_rotary_bases=True),
    "Exaone4ForCausalLM": Family(norms="after", rotary_only_in_windows=True),
    "NemotronForCausalLM": Family(),
    "Qwen3MoeForCausalLM": Family(),
    "OlmoeForCausalLM": Family(qk_norm_over_all_heads=True, assumed={"clip_qkv": None, "norm_topk_prob": False}),
    "MiniMaxM2ForCausalLM": Family(qk_norm_over_all_heads=True),
    "Glm4MoeForCausalLM": Family(),
    "ExaoneMoeForCausalLM": Family(rotary_only_in_windows=True),
    "HYV3ForCausalLM": Family(),
    "GptOssForCausalLM": Family(),
}
