"""Trains three tenants on the engine, on however many ranks torchrun has started, and saves what came of it.

usage: train.py MODEL OUT.npz TENSOR PIPELINE SEQUENCE_PARALLEL [DEVICE]
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_calls import part, random_datum

from service_common import checkpoint
from tinkerbell.v1 import common_pb2
from trainer_service.adamw import AdamParams
from trainer_service.engine import Engine, Limits
from trainer_service.losses import Loss
from trainer_service.parallel import Layout
from trainer_service.ranks import Process

TENANTS = {
    "ada": (common_pb2.LoraConfig(rank=8, alpha=16.0), Loss.CROSS_ENTROPY),
    "bob": (common_pb2.LoraConfig(rank=3, alpha=8.0, target_modules=["q_proj", "o_proj", "down_proj"]), Loss.PPO),
    "cy": (
        common_pb2.LoraConfig(
            rank=5, use_rslora=True, rank_pattern={"model.layers.0.self_attn.v_proj": 2}, target_modules=[]
        ),
        Loss.DRO,
    ),
}
STEPS = 3


def main(model: str, out: str, tensor: str, pipeline: str, sequence_parallel: str, device: str = "cpu") -> None:
    process = Process.from_environment()
    layout = Layout(int(tensor), int(pipeline), sequence_parallel == "1")
    engine = Engine(process.device(device), Limits(), layout)
    found = checkpoint.resolve(model)
    engine.load_base_model(found, lambda stage: None)
    results: dict = {}

    def record(name: str, adapter_id: str, buffer_name: str) -> None:
        arena = engine._adapters[adapter_id].arena
        results[name] = engine._gather(arena, getattr(arena, buffer_name)).cpu().numpy()

    rng = np.random.default_rng(0)
    for number, (adapter_id, (config, _)) in enumerate(TENANTS.items()):
        engine.create_adapter(adapter_id, config, seed=number)
        # B starts at 0, and with it A's gradient; start where both have one.
        arena = engine._adapters[adapter_id].arena
        tensors = engine.tensors(adapter_id)
        weights = {
            name: np.asarray(rng.normal(0, 0.05, value.shape), np.float32) if ".lora_B." in name else value
            for name, value in tensors.weights.items()
        }
        arena.load(arena.weights, weights)

    def parts() -> list:
        return [
            part(name, [random_datum(rng, length, found.vocab_size, loss) for length in (7, 30, 12)], loss)
            for name, (_, loss) in TENANTS.items()
        ]

    for step in range(STEPS + 1):
        for adapter_id, result in zip(TENANTS, engine.run_pass(parts()), strict=True):
            assert result.refusal is None
            results[f"{adapter_id} logprobs {step}"] = np.concatenate(result.logprobs)
            results.setdefault(f"{adapter_id} losses", []).append(result.sums["loss"])
        for adapter_id in TENANTS:
            if step == 0:  # look at the gradients, and leave them unapplied
                adapter = engine._adapters[adapter_id]
                results[f"{adapter_id} norm"] = np.array(engine._sum_gradients(adapter.arena))
                record(f"{adapter_id} gradients", adapter_id, "gradients")
                adapter.arena.gradients.zero_()
                adapter.accumulated_calls = 0
            else:
                params = AdamParams(learning_rate=1e-3, eps=1e-4, grad_clip_norm=1.0, weight_decay=0.1)
                results[f"{adapter_id} grad_norm {step}"] = np.array(engine.optim_step(adapter_id, params).grad_norm)
                record(f"{adapter_id} weights {step}", adapter_id, "weights")
    if process.rank == 0:
        np.savez(out, **results)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


main(*sys.argv[1:])
