"""The trainer's engine on a GPU, in the shape of Llama-3.1-8B: against PEFT, the bare base model, and itself."""

import contextlib
import functools
import gc
import os
import statistics
import time
from collections.abc import Iterator

# Ours and PEFT take turns with memory that both nearly fill. It must be set before PyTorch is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import torch

from benchmarks import harness, train
from benchmarks.harness import Row, Times
from benchmarks.train import Setting
from trainer_service.adamw import AdamParams
from trainer_service.engine import Engine

RANK = 32


def setting(quick: bool) -> Setting:
    """`quick`: a tiny model, on whatever device there is."""
    model = ("tiny-llama", "tiny", "llama") if quick else ("random-llama-8b", "llama-8b")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return Setting(harness.model_folder(*model), device, RANK, repeats=2 if quick else 5)


def _length(quick: bool, length: int) -> int:
    return min(length, 32) if quick else length


def vs_peft(quick: bool) -> Row:
    """A whole step of one tenant against PEFT's: first all of ours, then all of theirs. Both do not fit into 80 GB."""
    on, count, length = setting(quick), 2, _length(quick, 2048)
    engine = train.loaded_engine(on.folder, on.device)
    data = train.random_data(engine, [length] * count)
    params = AdamParams(learning_rate=1e-4)
    with train.tenants(engine, 1, on.rank) as (tenant,):
        ours = train.our_step(engine, tenant, data, params)
        first = ours()
        times = Times(harness.seconds(ours, on.repeats, on.finish), [])
        bound = on.bound(engine, count * length, times, ours)
    del engine, ours
    _forget(train.loaded_engine)
    theirs, step_name = train.peft_step(on, data, params)
    on.check_same(first, theirs())
    times.baseline.extend(harness.seconds(theirs, on.repeats, on.finish))
    return times.row(
        "train.vs_peft", f"{train.vs_peft_note(count, length, step_name, 1.4)}, one after the other{bound}"
    )


def cobatch8_vs_peft_swap(quick: bool) -> Row:
    """Eight tenants in one pass, against PEFT that goes from adapter to adapter."""
    on, count, length = setting(quick), 8, _length(quick, 256)
    engine = train.loaded_engine(on.folder, on.device)
    model = train.peft_model(on.folder, on.device, on.rank)
    data = train.random_data(engine, [length] * count)
    with train.tenants(engine, count, on.rank) as names:
        for name in names[1:]:
            model.add_adapter(name, model.peft_config["tenant-0"], autocast_adapter_dtype=False)
        parts = [train.part(name, [datum]) for name, datum in zip(names, data, strict=True)]
        batches = [torch.from_numpy(datum.tokens)[None].to(on.device) for datum in data]

        def swapping() -> None:
            for name, batch in zip(names, batches, strict=True):
                model.set_adapter(name)
                train.peft_forward_backward(model, batch)

        def clear() -> None:
            model.zero_grad()
            for name in names:
                if engine.optimizer_state(name, tensors=False).accumulated_calls:
                    engine.optim_step(name, train.STANDSTILL)

        times = on.compare(lambda: train.forward_backward(engine, parts), swapping, clear)
        for name in names[1:]:
            model.delete_adapter(name)
    note = f"{count} tenants x {length} tokens, one pass against PEFT's set_adapter and a pass each; at least 5 wanted"
    return times.row("train.cobatch8_vs_peft_swap", note)


def small_step(quick: bool) -> Row:
    """A small step with LoRA, against forward and backward of the bare base model as Hugging Face runs it."""
    on, length = setting(quick), _length(quick, 256)
    engine = train.loaded_engine(on.folder, on.device)
    model = train.peft_model(on.folder, on.device, on.rank)
    data = train.random_data(engine, [length])
    batch = torch.from_numpy(data[0].tokens)[None].to(on.device)

    def bare() -> None:
        with _differentiable(model.get_input_embeddings()), model.disable_adapter():
            train.peft_forward_backward(model, batch)

    with train.tenants(engine, 1, on.rank) as (name,):

        def ours() -> None:
            train.forward_backward(engine, [train.part(name, data)])
            engine.optim_step(name, train.STANDSTILL)

        times = on.compare(ours, bare)
        bound = on.bound(engine, length, times, ours)
    note = (
        f"1 x {length} tokens: forward, backward and step with LoRA, against forward and backward of Hugging Face's "
        f"bare model, eagerly; at most 0.08 s wanted{bound}"
    )
    return times.row("train.small_step", note)


def lora_overhead(quick: bool) -> Row:
    """Forward and backward with an adapter, against the frozen base model alone in the same engine."""
    _forget(train.peft_model)
    on, length = setting(quick), _length(quick, 2048)
    engine = train.loaded_engine(on.folder, on.device)
    data = train.random_data(engine, [length] * 2)
    with train.tenants(engine, 1, on.rank) as (name,), _differentiable(_embeddings(engine)):

        def ours() -> None:
            train.forward_backward(engine, [train.part(name, data)])

        def clear() -> None:
            if engine.optimizer_state(name, tensors=False).accumulated_calls:
                engine.optim_step(name, train.STANDSTILL)

        times = on.compare(ours, lambda: train.forward_backward(engine, [train.part("", data)]), clear)
        bound = on.bound(engine, 2 * length, times, ours)
    note = f"2 x {length} tokens, forward and backward, against no adapter at all; at least 0.85 wanted{bound}"
    return times.row("train.lora_overhead", note)


def cobatch8_vs_serial(quick: bool) -> Row:
    """Eight tenants in one pass against eight passes."""
    return train.cobatch_vs_serial(setting(quick), "train.cobatch8_vs_serial", 8, _length(quick, 256), wanted=5)


def tenants(quick: bool) -> Row:
    """The same sequences, of one tenant and of many. 64 adapters of rank 8 fit a GPU; of rank 32 they would not."""
    _forget(train.peft_model)
    on, length, rank = setting(quick), _length(quick, 64), 8
    counts = (1, 2) if quick else (1, 8, 32, 64)
    engine = train.loaded_engine(on.folder, on.device)
    data = train.random_data(engine, [length] * max(counts))
    rates = {}
    with train.tenants(engine, max(counts), rank) as names:
        for count in counts:
            share = len(data) // count
            parts = [train.part(name, data[index * share :][:share]) for index, name in enumerate(names[:count])]
            seconds = []
            for _ in range(1 + 3):
                started = time.perf_counter()
                train.forward_backward(engine, parts)
                on.finish()
                seconds.append(time.perf_counter() - started)
                for name in names[:count]:
                    engine.optim_step(name, train.STANDSTILL)
            rates[count] = len(data) * length / statistics.median(seconds[1:])
    note = ", ".join(f"{rate:,.0f} at {count}" for count, rate in rates.items())
    return Row(
        "scale.tenants",
        min(rates.values()),
        max(rates.values()),
        "tokens/s",
        f"{len(data)} x {length} tokens of rank {rank}, shared out among tenants; slowest against fastest: {note}; at "
        "least 0.75 wanted",
    )


@contextlib.contextmanager
def _differentiable(embeddings: torch.nn.Module) -> Iterator[None]:
    """The gradient of a frozen base model goes down to the embeddings, as it does below the lowest adapter."""
    handle = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def _embeddings(engine: Engine) -> torch.nn.Module:
    assert engine._model is not None
    return engine._model._model.embedding


def _forget(made: functools._lru_cache_wrapper) -> None:
    """Makes room for what comes: nobody else may have what this function has made."""
    made.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


ROWS = {
    "train.vs_peft": vs_peft,
    "train.cobatch8_vs_peft_swap": cobatch8_vs_peft_swap,
    "train.small_step": small_step,
    "train.lora_overhead": lora_overhead,
    "train.cobatch8_vs_serial": cobatch8_vs_serial,
    "scale.tenants": tenants,
}
