"""The trainer's engine, called as the service calls it: against itself used otherwise, and against PEFT."""

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from benchmarks import harness
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

RANK, ALPHA = 16, 32
NUM_TENANTS = 8
# The steps that only clear gradients between measurements leave the weights as they are.
STANDSTILL = AdamParams(learning_rate=0.0)


@functools.cache
def _engine(quick: bool) -> Engine:
    """One for all rows. `quick`: of a tiny random model, which proves nothing but that the rows run."""
    engine = Engine(torch.device("cpu"), Limits())
    engine.load_base_model(checkpoint.resolve(str(_folder(quick))), lambda stage: None)
    return engine


def _folder(quick: bool) -> Path:
    if quick:
        return harness.model_folder("tiny-llama", "tiny", "llama")
    return harness.model_folder("SmolLM2-135M-Instruct", "smollm2")


def _repeats(quick: bool) -> int:
    return 2 if quick else 7


@contextlib.contextmanager
def _tenants(engine: Engine, count: int) -> Iterator[list[str]]:
    """Adapters of rank 16 on all linear layers, for the `with` block."""
    config = common_pb2.LoraConfig(rank=RANK, alpha=ALPHA, target_modules=TARGET_MODULES)
    names = [f"tenant-{index}" for index in range(count)]
    for index, name in enumerate(names):
        engine.create_adapter(name, config, seed=index)
    try:
        yield names
    finally:
        for name in names:
            engine.remove_adapter(name)


def _data(engine: Engine, lengths: Sequence[int]) -> list[Datum]:
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


def _part(adapter_id: str, data: Sequence[Datum]) -> Part:
    return Part(adapter_id, data, Loss.CROSS_ENTROPY, LossConfig(), backward=True)


def _forward_backward(engine: Engine, parts: Sequence[Part]) -> list[PartResult]:
    results = engine.run_pass(parts)
    for result in results:
        if result.refusal:
            raise result.refusal
    return results


def cobatch8_vs_serial(quick: bool, length: int, wanted: float) -> Row:
    """Eight tenants with a sequence each: one pass against eight."""
    engine = _engine(quick)
    with _tenants(engine, NUM_TENANTS) as names:
        data = _data(engine, [length] * NUM_TENANTS)
        parts = [_part(name, [datum]) for name, datum in zip(names, data, strict=True)]

        def serial() -> None:
            for part in parts:
                _forward_backward(engine, [part])

        def clear() -> None:
            for name in names:
                engine.optim_step(name, STANDSTILL)

        times = harness.compare(lambda: _forward_backward(engine, parts), serial, _repeats(quick), clear)
    note = f"{NUM_TENANTS} tenants x {length} tokens, one pass against {NUM_TENANTS}; at least {wanted} wanted"
    return times.row(f"train.cobatch8_vs_serial_{length}", note)


def packed_vs_padded(quick: bool) -> Row:
    """Sequences of mixed length back to back, against the same engine with all of them as long as the longest."""
    engine = _engine(quick)
    rng = np.random.default_rng(0)
    lengths = [int(length) for length in rng.lognormal(np.log(64), 0.8, 8).clip(16, 256)]
    packed = _data(engine, lengths)
    padded = [_padded(datum, max(lengths)) for datum in packed]
    with _tenants(engine, 1) as (name,):
        times = harness.compare(
            lambda: _forward_backward(engine, [_part(name, packed)]),
            lambda: _forward_backward(engine, [_part(name, padded)]),
            _repeats(quick),
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


def vs_peft(quick: bool) -> Row:
    """One tenant's forward, backward and AdamW step, against PEFT's."""
    engine = _engine(quick)
    data = _data(engine, [128] * 8)
    params = AdamParams(learning_rate=1e-4)
    theirs, step_name = _peft_step(_folder(quick), np.stack([datum.tokens for datum in data]), params)
    with _tenants(engine, 1) as (name,):

        def ours() -> float:
            (result,) = _forward_backward(engine, [_part(name, data)])
            engine.optim_step(name, params)
            return losses.metrics(result.sums)["loss:mean"]

        # Both begin with B = 0: unless they agree now, they don't compute the same.
        first, expected = ours(), theirs()
        if abs(first - expected) > 1e-4 * expected:
            raise RuntimeError(f"the first loss is {first} and PEFT's is {expected}: not the same computation")
        times = harness.compare(ours, theirs, _repeats(quick))
    note = f"8 x 128 tokens, forward, backward, step; PEFT with SDPA and {step_name} AdamW; at least 1.0 wanted"
    return times.row("train.vs_peft", note)


def _peft_step(folder: Path, tokens: np.ndarray, params: AdamParams) -> tuple[Callable[[], float], str]:
    """A whole step with PEFT, which returns the mean loss, and which of PyTorch's AdamWs it uses: the faster one."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    # PEFT draws A as we do, B is zero.
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGET_MODULES), lora_dropout=0.0)
    model = peft.get_peft_model(base, config).train()
    batch = torch.from_numpy(tokens)  # of equal lengths, so it needs no mask, and SDPA takes its causal kernel
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward_backward() -> float:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        return loss.item()

    def optimizer(kind: str) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            trained,
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
            **{kind: True},
        )

    forward_backward()
    before = [parameter.detach().clone() for parameter in trained]
    times = harness.compare(optimizer("fused").step, optimizer("foreach").step, repeats=3)
    with torch.no_grad():
        for parameter, values in zip(trained, before, strict=True):
            parameter.copy_(values)
    kind = "fused" if sum(times.ours) <= sum(times.baseline) else "foreach"
    chosen = optimizer(kind)

    def step() -> float:
        chosen.zero_grad()
        loss = forward_backward()
        chosen.step()
        return loss

    return step, kind


def resident_adapter(quick: bool) -> Row:
    """The memory that the process gains with each adapter, against four float32 numbers a parameter."""
    engine = _engine(quick)
    count = 16
    data = _data(engine, [4])

    def train(name: str) -> None:
        """So that the system has really given the memory that was asked for."""
        _forward_backward(engine, [_part(name, data)])
        engine.optim_step(name, STANDSTILL)

    with _tenants(engine, 1) as names:
        train(*names)
    before = _resident_bytes()
    with _tenants(engine, count) as names:
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


ROWS: dict[str, Callable[[bool], Row]] = {
    "train.cobatch8_vs_serial_16": functools.partial(cobatch8_vs_serial, length=16, wanted=1.9),
    "train.cobatch8_vs_serial_48": functools.partial(cobatch8_vs_serial, length=48, wanted=1.3),
    "train.vs_peft": vs_peft,
    "train.packed_vs_padded": packed_vs_padded,
    "memory.resident_adapter": resident_adapter,
}
