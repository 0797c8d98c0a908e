"""The work that test_parallel.py has done by one rank and by two in every layout. The two are those of

torchrun --nproc-per-node=2 -m rank_programs.layouts MODELS OUT [DEVICE]

which reads MODELS/tiny-ARCHITECTURE and writes OUT/LAYOUT.npz, OUT/first.npz and OUT/checkpoints.
"""

import sys
from pathlib import Path

import numpy as np
from engine_calls import forward_backward, part, random_datum

from service_common import checkpoint
from service_common.checkpoint import Checkpoint
from tinkerbell.v1 import common_pb2
from trainer_service.adamw import AdamParams
from trainer_service.checkpoints import AdapterState, CheckpointStore
from trainer_service.engine import Engine, Limits, Tensors
from trainer_service.losses import Loss
from trainer_service.parallel import Layout
from trainer_service.ranks import Process

LAYOUTS = {
    # Between the models: tied and untied output layers, biases, norms of q and k, a sliding window.
    "tensor": (Layout(tensor=2), "qwen3"),
    "tensor-and-sequence": (Layout(tensor=2, sequence_parallel=True), "qwen2"),
    "data": (Layout(), "llama"),
    "pipeline": (Layout(pipeline=2), "qwen2"),
}
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


def loaded(model: Path, layout: Layout, device: str = "cpu") -> tuple[Engine, Checkpoint]:
    """An engine with the model on however many ranks there are."""
    engine = Engine(Process.from_environment().device(device), Limits(), layout)
    found = checkpoint.resolve(str(model))
    engine.load_base_model(found, lambda stage: None)
    return engine, found


def train_tenants(engine: Engine, found: Checkpoint) -> dict[str, np.ndarray]:
    """Trains three tenants. Returns log-probabilities, losses, gradients, norms and weights by a name for each."""
    results: dict = {}

    def record(name: str, adapter_id: str, buffer_name: str) -> None:
        arena = engine._adapters[adapter_id].arena
        results[name] = engine._gather(arena, getattr(arena, buffer_name)).to("cpu", copy=True).numpy()

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
    return {name: np.array(values) for name, values in results.items()}


def train_steps(engine: Engine, found: Checkpoint, store: CheckpointStore, first: int, last: int) -> list[float]:
    """Trains one adapter, from its newest checkpoint if `first` is above 1, and leaves one. Returns the losses."""
    if first == 1:
        engine.create_adapter("eve", common_pb2.LoraConfig(rank=6, alpha=12.0), seed=3)
    else:
        state = store.load(store.list("eve")[-1].checkpoint_id)
        assert state.step == first - 1
        tensors = Tensors(state.weights, state.exp_avg, state.exp_avg_sq)
        engine.create_adapter("eve", state.config, state.seed, tensors, state.step)
    rng = np.random.default_rng(0)
    data = [random_datum(rng, length, found.vocab_size) for length in (20, 9, 31)]
    losses = []
    for step in range(first, last + 1):
        losses.append(forward_backward(engine, "eve", data).sums["loss"])
        assert engine.optim_step("eve", AdamParams(learning_rate=3e-3, eps=1e-4)).step == step
    tensors = engine.tensors("eve")
    (info,) = [info for info in engine.list_adapters() if info.adapter_id == "eve"]
    engine.remove_adapter("eve")
    if Process.from_environment().rank == 0:
        state = AdapterState(
            adapter_id="eve",
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
    return losses


def main(models: Path, out: Path, device: str = "cpu") -> None:
    """All layouts one after the other, and five steps that leave a checkpoint."""
    from megatron.core import parallel_state  # noqa: PLC0415  (after the engine has made it importable)
    from torch import distributed  # noqa: PLC0415

    for name, (layout, architecture) in LAYOUTS.items():
        engine, found = loaded(models / f"tiny-{architecture}", layout, device)
        done = {name: train_tenants(engine, found)}
        if architecture == "qwen3":
            losses = train_steps(engine, found, CheckpointStore(out / "checkpoints"), 1, 5)
            done["first"] = {"losses": np.array(losses)}
        if Process.from_environment().rank == 0:
            for file, results in done.items():
                np.savez(out / f"{file}.npz", **results)
        distributed.barrier()
        parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
