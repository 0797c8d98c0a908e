"""States of adapters, as checkpoints hold them."""

import dataclasses

import numpy as np

from service_common import lora
from tinkerbell.v1 import common_pb2
from trainer_service.checkpoints import AdapterState
from trainer_service.idempotency import Reply

HIDDEN, MLP, LAYERS = 32, 64, 2
SHAPES = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN // 2, HIDDEN), "down_proj": (HIDDEN, MLP)}  # (out, in)
DEFAULT_RANK = 4
RANK_PATTERN = {"model.layers.0.mlp.down_proj": 3, "model.layers.1.self_attn.q_proj": 6}
ALPHA_PATTERN = {"model.layers.1.self_attn.q_proj": 5.5, "model.layers.1.mlp.down_proj": 40.0}


def tensors_of(config: common_pb2.LoraConfig, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module in config.target_modules:
            path = lora.module_path(layer, module)
            rank = config.rank_pattern.get(path, config.rank)
            out_features, in_features = SHAPES[module]
            tensors[lora.peft_name(path, "A")] = generator.standard_normal((rank, in_features), dtype=np.float32)
            tensors[lora.peft_name(path, "B")] = generator.standard_normal((out_features, rank), dtype=np.float32)
    return tensors


def config_of(rank_pattern: dict[str, int], alpha_pattern: dict[str, float], use_rslora: bool) -> common_pb2.LoraConfig:
    return common_pb2.LoraConfig(
        rank=DEFAULT_RANK,
        alpha=0.5,
        target_modules=SHAPES,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


def state_of(adapter_id: str = "alice", **changes) -> AdapterState:
    config = config_of(RANK_PATTERN, ALPHA_PATTERN, use_rslora=True)
    state = AdapterState(
        adapter_id=adapter_id,
        config=config,
        base_model_name="models/tiny",
        base_model_fingerprint="f" * 64,
        seed=2**64 - 1,
        step=7,
        seq_id=19,
        last_adam={"learning_rate": 0.1, "eps": 1e-12},
        published_version=3,
        replies=[Reply("r1", "ab", "tinkerbell.v1.OptimStepResponse", b"\x00\xff"), Reply("r2", "cd", "", b"")],
        weights=tensors_of(config, 1),
        exp_avg=tensors_of(config, 2),
        exp_avg_sq=tensors_of(config, 3),
    )
    return dataclasses.replace(state, **changes)
