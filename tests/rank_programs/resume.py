"""Trains one adapter, from a checkpoint or from the start, and may leave a checkpoint.

usage: resume.py MODEL FOLDER TENSOR FIRST_STEP LAST_STEP OUT.npz
FIRST_STEP above 1 begins from the checkpoint in FOLDER; every run leaves one there. Losses of the steps go to OUT.npz.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_calls import forward_backward, random_datum

from service_common import checkpoint
from tinkerbell.v1 import common_pb2
from trainer_service.adamw import AdamParams
from trainer_service.checkpoints import AdapterState, CheckpointStore
from trainer_service.engine import Engine, Limits, Tensors
from trainer_service.parallel import Layout
from trainer_service.ranks import Process


def main(model: str, folder: str, tensor: str, first: str, last: str, out: str) -> None:
    process = Process.from_environment()
    engine = Engine(process.device("cpu"), Limits(), Layout(int(tensor)))
    found = checkpoint.resolve(model)
    engine.load_base_model(found, lambda stage: None)
    store = CheckpointStore(Path(folder))
    if int(first) == 1:
        engine.create_adapter("ada", common_pb2.LoraConfig(rank=6, alpha=12.0), seed=3)
    else:
        state = store.load(store.list("ada")[-1].checkpoint_id)
        assert state.step == int(first) - 1
        tensors = Tensors(state.weights, state.exp_avg, state.exp_avg_sq)
        engine.create_adapter("ada", state.config, state.seed, tensors, state.step)
    losses = []
    rng = np.random.default_rng(0)
    data = [random_datum(rng, length, found.vocab_size) for length in (20, 9, 31)]
    for step in range(int(first), int(last) + 1):
        losses.append(forward_backward(engine, "ada", data).sums["loss"])
        assert engine.optim_step("ada", AdamParams(learning_rate=3e-3, eps=1e-4)).step == step
    tensors = engine.tensors("ada")
    if process.rank == 0:
        np.savez(out, losses=losses)
        (info,) = engine.list_adapters()
        state = AdapterState(
            adapter_id="ada",
            config=info.config,
            base_model_name=found.name,
            base_model_fingerprint=found.fingerprint,
            seed=info.seed,
            step=info.step,
            seq_id=0,
            last_adam=None,
            published_version=0,
            replies=[],
            weights=dict(tensors.weights),
            exp_avg=dict(tensors.exp_avg or {}),
            exp_avg_sq=dict(tensors.exp_avg_sq or {}),
        )
        store.save(state, f"step-{info.step}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


main(*sys.argv[1:])
