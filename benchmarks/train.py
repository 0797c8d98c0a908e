"""The trainer's engine, called as the service calls it: against itself used otherwise, and against PEFT."""

import contextlib
import ctypes
import functools
import gc
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from benchmarks import bounds, harness
from benchmarks.harness import Row
from service_common import checkpoint
from service_common.lora import TARGET_MODULES
from tinkerbell.v1 import common_pb2
from trainer_service import losses
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.engine import Engine, Limits
from trainer_service.losses import Loss, LossConfig
from trainer_service.passes import Part, PartResult

# The steps that only clear gradients between measurements leave the weights as they are.
STANDSTILL = AdamParams(learning_rate=0.0)


@dataclass(frozen=True)
class Setting:
    """What is measured on: a base model on a device, and adapters of one rank on all of its linear layers."""

    folder: Path
    device: torch.device
    rank: int
    repeats: int

    @property
    def tolerance(self) -> float:
        """How far two correct losses may be apart, relatively: base weights are float32 or bfloat16."""
        return 1e-4 if self.device.type == "cpu" else 1e-2

    def check_same(self, first: float, expected: float) -> None:
        """RuntimeError unless the first losses of ours and PEFT's agree, which both have with B = 0."""
        if abs(first - expected) > self.tolerance * expected:
            raise RuntimeError(f"the first loss is {first} and PEFT's is {expected}: not the same computation")

    def finish(self) -> None:
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compare(
        self, ours: Callable[[], object], baseline: Callable[[], object], between: Callable[[], object] = lambda: None
    ) -> harness.Times:
        """See harness.compare."""
        return harness.compare(ours, baseline, self.repeats, between, self.finish)

    def bound(self, engine: Engine, tokens: int, times: harness.Times, ours: Callable[[], object]) -> str:
        """The end of a note: what bounds a pass on a GPU. `ours` runs once more; an adapter must be there."""
        if self.device.type == "cpu":
            return ""
        assert engine.checkpoint is not None
        parameters = engine.list_adapters()[0].num_parameters
        return "; " + bounds.training(engine.checkpoint, parameters, tokens, statistics.median(times.ours), ours)


def _setting(quick: bool) -> Setting:
    """`quick`: a tiny random model, which proves nothing but that the rows run."""
    name, *arguments = ("tiny-llama", "tiny", "llama") if quick else ("SmolLM2-135M-Instruct", "smollm2")
    return Setting(harness.model_folder(name, *arguments), torch.device("cpu"), rank=16, repeats=2 if quick else 7)


@functools.cache
def loaded_engine(folder: Path, device: torch.device) -> Engine:
    """One for all rows."""
    engine = Engine(device, Limits())
    engine.load_base_model(checkpoint.resolve(str(folder)), lambda stage: None)
    return engine


@contextlib.contextmanager
def tenants(engine: Engine, count: int, rank: int) -> Iterator[list[str]]:
    """Adapters on all linear layers, for the `with` block."""
    config = common_pb2.LoraConfig(rank=rank, alpha=2 * rank, target_modules=TARGET_MODULES)
    names = [f"tenant-{index}" for index in range(count)]
    for index, name in enumerate(names):
        engine.create_adapter(name, config, seed=index)
    try:
        yield names
    finally:
        for name in names:
            engine.remove_adapter(name)


def random_data(engine: Engine, lengths: Sequence[int]) -> list[Datum]:
    """Random tokens, each position's target being the next token; the last has none."""
    assert engine.checkpoint is not None
    rng = np.random.default_rng(0)
    data = []
    for length in lengths:
        tokens = rng.integers(0, engine.checkpoint.vocab_size, length)
        weights = np.ones(length, np.float32)
        weights[-1] = 0
        data.append(Datum(tokens, np.roll(tokens, -1), {"weights": weights}))
    return data


def part(adapter_id: str, data: Sequence[Datum]) -> Part:
    """A ForwardBackward with the loss of language models."""
    return Part(adapter_id, data, Loss.CROSS_ENTROPY, LossConfig(), backward=True)


def forward_backward(engine: Engine, parts: Sequence[Part]) -> list[PartResult]:
    """One pass. Raises a part's refusal."""
    results = engine.run_pass(parts)
    for result in results:
        if result.refusal:
            raise result.refusal
    return results


def cobatch_vs_serial(setting: Setting, name: str, count: int, length: int, wanted: float) -> Row:
    """Tenants with a sequence each: one pass against as many as there are tenants."""
    engine = loaded_engine(setting.folder, setting.device)
    with tenants(engine, count, setting.rank) as names:
        data = random_data(engine, [length] * count)
        parts = [part(tenant, [datum]) for tenant, datum in zip(names, data, strict=True)]

        def serial() -> None:
            for each in parts:
                forward_backward(engine, [each])

        def clear() -> None:
            for tenant in names:
                engine.optim_step(tenant, STANDSTILL)

        times = setting.compare(lambda: forward_backward(engine, parts), serial, clear)
        bound = setting.bound(engine, count * length, times, lambda: forward_backward(engine, parts))
    note = f"{count} tenants x {length} tokens, one pass against {count}; at least {wanted} wanted{bound}"
    return times.row(name, note)


def packed_vs_padded(quick: bool) -> Row:
    """Sequences of mixed length back to back, against the same engine with all of them as long as the longest."""
    setting = _setting(quick)
    engine = loaded_engine(setting.folder, setting.device)
    rng = np.random.default_rng(0)
    lengths = [int(length) for length in rng.lognormal(np.log(64), 0.8, 8).clip(16, 256)]
    packed = random_data(engine, lengths)
    padded = [_padded(datum, max(lengths)) for datum in packed]
    with tenants(engine, 1, setting.rank) as (name,):
        times = setting.compare(
            lambda: forward_backward(engine, [part(name, packed)]),
            lambda: forward_backward(engine, [part(name, padded)]),
            lambda: engine.optim_step(name, STANDSTILL),
        )
    note = (
        f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all, against "
        f"{len(lengths) * max(lengths)} with padding"
    )
    return times.row("train.packed_vs_padded", note)


def _padded(datum: Datum, length: int) -> Datum:
    """With zeros at the end, which the loss ignores."""

    def fill(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, length - len(datum)))

    inputs = {name: fill(values) for name, values in datum.inputs.items()}
    return Datum(fill(datum.tokens), fill(datum.target_tokens), inputs)


def vs_peft(setting: Setting, name: str, count: int, length: int, wanted: float) -> Row:
    """One tenant's forward, backward and AdamW step, against PEFT's."""
    engine = loaded_engine(setting.folder, setting.device)
    data = random_data(engine, [length] * count)
    params = AdamParams(learning_rate=1e-4)
    theirs, step_name = peft_step(setting, data, params)
    with tenants(engine, 1, setting.rank) as (tenant,):
        ours = our_step(engine, tenant, data, params)
        setting.check_same(ours(), theirs())
        times = setting.compare(ours, theirs)
        bound = setting.bound(engine, count * length, times, ours)
    return times.row(name, vs_peft_note(count, length, step_name, wanted) + bound)


def vs_peft_note(count: int, length: int, step_name: str, wanted: float) -> str:
    """What is measured and what is wanted."""
    return (
        f"{count} x {length} tokens, forward, backward, step; PEFT with SDPA and {step_name} AdamW; at least {wanted} "
        "wanted"
    )


def our_step(engine: Engine, tenant: str, data: Sequence[Datum], params: AdamParams) -> Callable[[], float]:
    """A whole step of a tenant's, which returns the mean loss."""

    def step() -> float:
        (result,) = forward_backward(engine, [part(tenant, data)])
        engine.optim_step(tenant, params)
        return losses.metrics(result.sums)["loss:mean"]

    return step


@functools.cache
def peft_model(folder: Path, device: torch.device, rank: int) -> peft.PeftModel:
    """PEFT's model with adapter tenant-0. Base weights as in our engine, the adapter's in the same dtype: PEFT's faster
    way.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", device_map=device
    )
    # PEFT draws A as we do, B is zero.
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGET_MODULES), lora_dropout=0.0)
    return peft.get_peft_model(base, config, adapter_name="tenant-0", autocast_adapter_dtype=False).train()


def peft_forward_backward(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The mean loss. `batch` [N, L] of equal lengths needs no mask, so that SDPA takes its causal kernel."""
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def peft_step(setting: Setting, data: Sequence[Datum], params: AdamParams) -> tuple[Callable[[], float], str]:
    """A whole step with PEFT, which returns the mean loss, and which of PyTorch's AdamWs it uses: the faster one."""
    model = peft_model(setting.folder, setting.device, setting.rank)
    batch = torch.from_numpy(np.stack([datum.tokens for datum in data])).to(setting.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def optimizer(kind: str) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            trained,
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
            **{kind: True},
        )

    peft_forward_backward(model, batch)
    before = [parameter.detach().clone() for parameter in trained]
    times = harness.compare(optimizer("fused").step, optimizer("foreach").step, repeats=3, finish=setting.finish)
    with torch.no_grad():
        for parameter, values in zip(trained, before, strict=True):
            parameter.copy_(values)
    kind = "fused" if sum(times.ours) <= sum(times.baseline) else "foreach"
    chosen = optimizer(kind)

    def step() -> float:
        chosen.zero_grad()
        loss = peft_forward_backward(model, batch)
        chosen.step()
        return loss.item()

    return step, kind


def resident_adapter(quick: bool) -> Row:
    """The memory that the process gains with each adapter, against four float32 numbers a parameter."""
    setting = _setting(quick)
    engine = loaded_engine(setting.folder, setting.device)
    count = 16
    data = random_data(engine, [4])

    def train(name: str) -> None:
        """So that the system has really given the memory that was asked for."""
        forward_backward(engine, [part(name, data)])
        engine.optim_step(name, STANDSTILL)

    with tenants(engine, 1, setting.rank) as names:
        train(*names)
    before = _resident_bytes()
    with tenants(engine, count, setting.rank) as names:
        for name in names:
            train(name)
        ours = (_resident_bytes() - before) / count
        parameters = engine.list_adapters()[0].num_parameters
    floor = 4 * 4 * parameters
    note = (
        f"growth of the process over {count} adapters of {parameters / 1e6:.2f} M parameters, {ours / floor - 1:+.1%} "
        "against 16 bytes a parameter; at most +5% wanted"
    )
    return Row("memory.resident_adapter", ours / 1e6, floor / 1e6, "MB", note)


def _resident_bytes() -> int:
    """Memory that the process has, without what is free in its heap and would be used first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cobatch8(quick: bool, length: int, wanted: float) -> Row:
    return cobatch_vs_serial(_setting(quick), f"train.cobatch8_vs_serial_{length}", 8, length, wanted)


ROWS: dict[str, Callable[[bool], Row]] = {
    "train.cobatch8_vs_serial_16": functools.partial(_cobatch8, length=16, wanted=1.9),
    "train.cobatch8_vs_serial_48": functools.partial(_cobatch8, length=48, wanted=1.3),
    "train.vs_peft": lambda quick: vs_peft(_setting(quick), "train.vs_peft", 8, 128, wanted=1.0),
    "train.packed_vs_padded": packed_vs_padded,
    "memory.resident_adapter": resident_adapter,
}
