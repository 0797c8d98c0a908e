"""Models and processes that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from sampler_processes import SamplerProcess, made_model, start_sampler, wait_ready


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return made_model("SmolLM2-135M-Instruct", "smollm2")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama without a tokenizer, with heads wide enough for vLLM on a CPU, which takes 32 and up."""
    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sampler_process(smollm2: Path) -> Iterator[SamplerProcess]:
    """One real sampler for all tests: SmolLM2 in float32."""
    sampler = start_sampler(smollm2, "--dtype", "float32", "--max-model-len", "2048")
    try:
        yield wait_ready(sampler)
    finally:
        sampler.process.terminate()
        sampler.process.wait(60)
