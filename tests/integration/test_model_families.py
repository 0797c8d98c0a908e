"""Mixtures of experts, and checkpoints that are refused.

Tolerance: 1e-5 in float32. With a bfloat16 base model 0.1, since a token may go to another expert of almost the same
score when a pass has another size.

What each family computes is compared by scripts/model_table.py, whose outcome is docs/models.md.
"""

import subprocess
import sys
from pathlib import Path

import device
import numpy as np
import pytest
import torch
import transformers
from engine_calls import arena_of, forward_backward, part, random_datum
from processes import ROOT, made_model

from service_common import checkpoint
from service_common.errors import ServiceError
from service_common.lora import ATTENTION_MODULES
from tinkerbell.v1 import common_pb2
from trainer_service.batch import Datum
from trainer_service.engine import Engine, Limits

pytestmark = pytest.mark.engine

TOLERANCE = device.tolerance(1e-5, 0.1)
RANKS = {"alice": 4, "bob": 8, "carol": 16}
LENGTHS = {"alice": (40, 7), "bob": (64,), "carol": (1, 30, 25)}


def data_of(adapter_id: str, vocab_size: int) -> list[Datum]:
    rng = np.random.default_rng(sorted(RANKS).index(adapter_id))
    return [random_datum(rng, length, vocab_size) for length in LENGTHS[adapter_id]]


@pytest.fixture(scope="module", params=["tiny-qwen3_moe", "tiny-olmoe"])
def engine(request) -> Engine:
    """With three adapters whose B is not zero."""
    folder = made_model(request.param, "tiny", request.param.removeprefix("tiny-"))
    engine = Engine(device.of_engine(), Limits())
    engine.load_base_model(checkpoint.resolve(str(folder)), lambda stage: None)
    for seed, (adapter_id, rank) in enumerate(RANKS.items()):
        config = common_pb2.LoraConfig(rank=rank, alpha=16.0, target_modules=ATTENTION_MODULES)
        engine.create_adapter(adapter_id, config, seed=seed)
        weights = arena_of(engine, adapter_id).weights
        weights.copy_(torch.empty(weights.shape).normal_(std=0.1, generator=torch.Generator().manual_seed(seed)))
    return engine


def trained(engine: Engine, adapter_ids: list[str]) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Log-probabilities and gradients of each adapter in one pass of all."""
    for name in RANKS:
        arena_of(engine, name).gradients.zero_()
    results = engine.run_pass([part(name, data_of(name, engine.checkpoint.vocab_size)) for name in adapter_ids])
    logprobs = {name: np.concatenate(result.logprobs) for name, result in zip(adapter_ids, results, strict=True)}
    return logprobs, {name: arena_of(engine, name).gradients.clone() for name in adapter_ids}


def test_tenants_of_a_mixture_of_experts_compute_what_they_compute_alone(engine: Engine) -> None:
    logprobs, gradients = trained(engine, ["carol", "alice", "bob"])
    for name in RANKS:
        alone, gradient_alone = trained(engine, [name])
        assert np.abs(logprobs[name] - alone[name]).max() <= TOLERANCE
        difference = (gradients[name] - gradient_alone[name]).norm()
        assert gradient_alone[name].norm() > 0
        assert difference <= TOLERANCE * gradient_alone[name].norm()


def test_a_crowded_expert_drops_no_token(engine: Engine) -> None:
    """Many copies of one sequence go to the same experts, which must serve all of them."""
    (datum,) = data_of("bob", engine.checkpoint.vocab_size)
    alone = forward_backward(engine, "", [datum], backward=False).logprobs[0]
    crowd = forward_backward(engine, "", [datum] * 20, backward=False).logprobs
    assert np.abs(np.stack(crowd) - alone).max() <= TOLERANCE


def refused(tmp_path: Path, config: transformers.PretrainedConfig) -> str:
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ServiceError) as caught:
        Engine(device.of_engine(), Limits()).load_base_model(
            checkpoint.resolve(str(tmp_path / "model")), lambda stage: None
        )
    return str(caught.value)


SHAPE = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (transformers.LlamaConfig(**SHAPE, intermediate_size=48, attention_bias=True), "linear_qkv.bias"),
        (transformers.OlmoeConfig(**SHAPE, intermediate_size=48, num_experts=8, norm_topk_prob=True), "norm_topk_prob"),
        (transformers.LlamaConfig(**SHAPE, intermediate_size=48, rope_parameters=DYNAMIC), "dynamic"),
        (transformers.OPTConfig(**SHAPE, ffn_dim=48), "OPTForCausalLM"),
    ],
    ids=["bias", "assumed value", "rotary scaling", "family"],
)
def test_what_would_compute_something_else_is_refused_by_name(tmp_path: Path, config, culprit: str) -> None:
    assert culprit in refused(tmp_path, config)


@pytest.mark.cpu_only
@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_the_table_still_holds(architecture: str) -> None:
    tried = subprocess.run(
        [sys.executable, ROOT / "scripts/model_table.py", "--only", architecture],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tried.returncode == 0, tried.stdout + tried.stderr[-2000:]
    assert f"{architecture}: trains and matches PEFT" in tried.stdout
