"""A checkpoint's folder is one that PEFT reads."""

import peft
import pytest
import torch
import transformers
from checkpoint_states import (
    ALPHA_PATTERN,
    DEFAULT_RANK,
    HIDDEN,
    LAYERS,
    MLP,
    RANK_PATTERN,
    SHAPES,
    config_of,
    state_of,
    tensors_of,
)

from service_common import lora
from tinkerbell import peft_folder
from tinkerbell.lora import LoraConfig
from trainer_service.checkpoints import CheckpointStore

pytestmark = pytest.mark.engine


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


def llama() -> transformers.LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(24)[None] % 17).logits


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("patterns", [({}, {}), (RANK_PATTERN, ALPHA_PATTERN)], ids=["plain", "patterns"])
def test_peft_loads_the_folder_as_it_is(store, use_rslora, patterns):
    rank_pattern, alpha_pattern = patterns
    config = config_of(rank_pattern, alpha_pattern, use_rslora)
    weights = tensors_of(config, 5)
    path = store.save(state_of(config=config, weights=weights), "one").path
    got = logits(peft.PeftModel.from_pretrained(llama(), path))

    merged = llama()
    unchanged = logits(merged)
    for layer in range(LAYERS):
        for module in SHAPES:
            name = lora.module_path(layer, module)
            rank = rank_pattern.get(name, DEFAULT_RANK)
            alpha = alpha_pattern.get(name, 0.5)
            scale = alpha / (rank**0.5 if use_rslora else rank)
            update = scale * weights[lora.peft_name(name, "B")] @ weights[lora.peft_name(name, "A")]
            linear = merged.get_submodule(name)
            assert isinstance(linear, torch.nn.Linear)
            linear.weight.data += torch.from_numpy(update)
    expected = logits(merged)
    assert (expected - unchanged).abs().max() > 0.1  # the adapter matters
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_adapter_config_says_what_peft_would_write():
    config = LoraConfig.from_proto(config_of(RANK_PATTERN, ALPHA_PATTERN, use_rslora=True))
    ours = peft_folder.adapter_config(config, "models/tiny")
    theirs = peft.LoraConfig.from_peft_type(**ours)
    assert isinstance(theirs, peft.LoraConfig)
    written = theirs.to_dict()
    assert set(ours) <= set(written)
    assert {key: written[key] for key in ours if key != "target_modules"} == {
        key: value for key, value in ours.items() if key != "target_modules"
    }
    assert theirs.target_modules == set(SHAPES)
