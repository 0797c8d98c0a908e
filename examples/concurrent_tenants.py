"""Four tenants at once on one model: a sweep over learning rates and ranks that shares the trainer's passes.

    python -m examples.concurrent_tenants [--trainer HOST:PORT --sampler HOST:PORT]

The tenants train twice on the same data from the same initial values: one after another, then all at the same time.
The second time takes less, since calls that wait together go through the model together; and every loss comes out as
the first time, since what shares a pass does not mix.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable

import numpy as np
import reasoning_gym
import rich
import rich.table
import transformers
import typer
from matplotlib.figure import Figure

from examples import support
from tinkerbell import AsyncTrainerClient, Datum

BATCH_SIZE = 2  # small steps gain most from company


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Somebody with an adapter."""

    name: str
    rank: int
    learning_rate: float


TENANTS = (Tenant("ada", 4, 1e-4), Tenant("grace", 8, 3e-4), Tenant("emmy", 16, 1e-3), Tenant("sofia", 32, 3e-3))


async def train(
    trainer: AsyncTrainerClient, tenant: Tenant, batches: list[list[Datum]], on_step: Callable[[], None]
) -> list[float]:
    """One tenant's loop. Returns the loss of each step."""
    run = await trainer.create_lora_adapter(support.new_name(tenant.name), rank=tenant.rank)
    results = []
    for batch in batches:  # all steps at once: the trainer keeps their order, and always sees what could share a pass
        results.append(run.forward_backward(batch))
        step = run.optim_step(learning_rate=tenant.learning_rate)
    losses = []
    for result in results:
        losses.append((await result).loss)
        on_step()
    await step
    await run.remove()
    return losses


def make_batches(model: str, steps: int) -> list[list[Datum]]:
    """Sums with their answers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    problems = reasoning_gym.create_dataset(
        "chain_sum", size=steps * BATCH_SIZE, seed=7, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    data = [
        Datum.from_prompt_and_completion(
            tokenizer(problem["question"]).input_ids,
            [*tokenizer(f" {problem['answer']}").input_ids, tokenizer.eos_token_id],
        )
        for problem in problems
    ]
    return [data[start : start + BATCH_SIZE] for start in range(0, len(data), BATCH_SIZE)]


async def sweep(trainer_address: str, steps: int) -> tuple[list[list[float]], list[list[float]], float, float]:
    """Losses by tenant and step one after another and all at once, and the seconds that each took."""
    async with AsyncTrainerClient(trainer_address) as trainer:
        info = await trainer.get_backend_info()
        assert info.base_model  # a trainer that serves has one
        batches = await asyncio.to_thread(make_batches, info.base_model.name, steps)
        await trainer.forward(batches[0])  # a new trainer's first pass is slow
        with support.progress_bar() as progress:

            def bar(name: str) -> Callable[[], None]:
                task = progress.add_task(name, total=steps, reading="")
                return lambda: progress.advance(task)

            started = time.monotonic()
            alone = [await train(trainer, tenant, batches, bar(f"{tenant.name}, alone")) for tenant in TENANTS]
            between = time.monotonic()
            together = await asyncio.gather(
                *(train(trainer, tenant, batches, bar(f"{tenant.name}, with the others")) for tenant in TENANTS)
            )
            return alone, together, between - started, time.monotonic() - between


def main(
    trainer_address: support.TrainerAddress = "",
    sampler_address: support.SamplerAddress = "",
    steps: support.Steps = 12,
    out: support.OutFolder = support.OUT / "concurrent_tenants",
) -> tuple[list[list[float]], list[list[float]]]:
    """Trains four tenants in turn, then at once. Returns the losses of both, by tenant and step."""
    with support.services(trainer_address, sampler_address, out) as services:
        alone, together, alone_seconds, together_seconds = asyncio.run(sweep(services.trainer, steps))

    difference = np.abs(np.array(alone) - np.array(together)).max(axis=1)
    table = rich.table.Table(
        "tenant", "rank", "learning rate", "first loss", "last loss", "alone and together differ by"
    )
    for tenant, losses, largest in zip(TENANTS, together, difference, strict=True):
        table.add_row(
            tenant.name,
            str(tenant.rank),
            f"{tenant.learning_rate:g}",
            f"{losses[0]:.3f}",
            f"{losses[-1]:.3f}",
            f"{largest:.1e}",
        )
    rich.print(table)
    rich.print(
        f"{len(TENANTS)} tenants, {steps} steps each: {alone_seconds:.1f} s one after another, "
        f"{together_seconds:.1f} s at once, {alone_seconds / together_seconds:.2f} times as fast"
    )

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for tenant, losses in zip(TENANTS, together, strict=True):
        axes.plot(range(1, steps + 1), losses, label=f"{tenant.learning_rate:g}, rank {tenant.rank}")
    axes.set(xlabel="step", ylabel="loss per answer token, nats", yscale="log", title="Four tenants at once")
    axes.legend(title="learning rate")
    axes.grid(alpha=0.3)
    figure.savefig(out / "loss.png", dpi=120)
    rich.print(f"{out}/loss.png")
    return alone, together


if __name__ == "__main__":
    typer.run(main)
