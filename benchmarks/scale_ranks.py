"""What ranks train together, one layout after another: a program for torchrun, which benchmarks.scale starts.

Weights are random and were never on a disk: no time of a pass depends on them, and 140 GB need not be written first.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import json
import statistics
import struct
import tempfile
from pathlib import Path

import torch
import transformers
from torch import distributed, nn

from benchmarks import harness, train
from benchmarks.scale_plan import REPEATS, Measured, Measurement
from scripts.make_models import LLAMA_8B
from service_common import checkpoint
from trainer_service.engine import Engine, Limits
from trainer_service.parallel import Layout
from trainer_service.ranks import Process

LLAMA_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
SHAPES = {
    "8b": LLAMA_8B,
    "70b": transformers.LlamaConfig(**LLAMA_8B.to_dict() | LLAMA_70B),
    "tiny": transformers.LlamaConfig(
        **LLAMA_8B.to_dict()
        | dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16)
        | dict(num_attention_heads=4, num_key_value_heads=2)
    ),
}


def shape_folder(name: str) -> Path:
    """A checkpoint without its numbers: a configuration, and a file that has a header and a hole."""
    folder = harness.MODELS / f"shape-{name}"
    if not folder.is_dir():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
        header, end = {}, 0
        for key, tensor in model.state_dict().items():
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
            end += tensor.nbytes
        text = json.dumps(header).encode()
        harness.MODELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=harness.MODELS) as parent:
            made = Path(parent) / "made"
            SHAPES[name].save_pretrained(made)
            with (made / "model.safetensors").open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.truncate(file.tell() + end)
            with contextlib.suppress(OSError):  # another rank was faster
                made.rename(folder)
    return folder


def fill_instead_of_loading() -> None:
    """Makes Bridge give every model random weights."""
    importlib.import_module("trainer_service.megatron.runtime")  # before anything of Megatron
    from megatron.bridge import AutoBridge  # noqa: PLC0415

    to_provider = AutoBridge.to_megatron_provider

    def filled(models: list[nn.Module]) -> list[nn.Module]:
        for name, tensor in models[0].named_parameters():
            nn.init.ones_(tensor) if "norm" in name else nn.init.normal_(tensor, std=0.02)
        return models

    def provider_of(bridge: AutoBridge):
        provider = to_provider(bridge, load_weights=False)
        provider.perform_initialization = False
        provider.register_pre_wrap_hook(filled)
        return provider

    AutoBridge.to_megatron_provider = provider_of


def measured(wanted: Measurement, device: str) -> Measured:
    """Steps on one pass over all ranks, gradients' sums included; all of them call this."""
    total = wanted.tokens_per_gpu * wanted.num_gpus
    limits = Limits(max_pass_tokens=total, max_adapters=wanted.tenants, max_resident_adapters=wanted.tenants)
    layout = Layout(wanted.tensor, wanted.pipeline, sequence_parallel=wanted.tensor > 1)
    engine = Engine(Process.from_environment().device(device), limits, layout)
    engine.load_base_model(checkpoint.resolve(str(shape_folder(wanted.shape))), lambda stage: None)
    assert engine.checkpoint is not None
    each = total // wanted.tenants
    lengths = [min(wanted.length, each)] * (each // min(wanted.length, each))
    with train.tenants(engine, wanted.tenants, wanted.rank) as names:
        parts = [train.part(name, train.random_data(engine, lengths)) for name in names]

        def step() -> None:
            train.forward_backward(engine, parts)
            for name in names:
                engine.optim_step(name, train.STANDSTILL)

        on_gpu = device == "cuda"
        seconds = statistics.median(harness.seconds(step, REPEATS, torch.cuda.synchronize if on_gpu else lambda: None))
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return Measured(wanted.name, total / seconds, engine.checkpoint.num_parameters, memory)


def main() -> None:
    """Does what it is told, and appends each result as a line to a file as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("measurements", help="Measurements, in JSON")
    parser.add_argument("device", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    fill_instead_of_loading()
    from megatron.core import parallel_state  # noqa: PLC0415  (once it can be imported)

    for wanted in (Measurement(**fields) for fields in json.loads(arguments.measurements)):
        result = measured(wanted, arguments.device)
        if Process.from_environment().rank == 0:
            with arguments.results.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(result)) + "\n")
        parallel_state.destroy_model_parallel()
        gc.collect()  # the engine is part of cycles
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
