"""Two tenants fine-tune one model at the same time, each for a task of its own, and sample what they have just learned.

    make demo

Starts a trainer and a sampler as separate processes on this machine. Each tenant then trains a LoRA adapter on problems
from reasoning-gym, publishes it every few steps (from the trainer's memory to the sampler's, over gRPC) and measures
its accuracy by letting vLLM answer problems that are not in its training set. Before training, the model answers in
sentences and fails the tasks' own verifiers; afterwards it gives the bare answer.

Writes out/demo/summary.json and out/demo/curves.png.
"""

import argparse
import itertools
import json
import random
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import reasoning_gym
import rich
import rich.table
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from examples.file_watch import AdapterFileWatch
from tinkerbell import Datum, SamplerClient, TrainerClient
from tinkerbell.local import LocalServices, free_address

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
BATCH_SIZE = 8
RANK, ALPHA = 16, 32.0


@dataclass
class Tenant:
    """Somebody with a task, and what came of it."""

    name: str
    task: str
    options: dict[str, Any]
    learning_rate: float  # of the first step; it falls to zero in a straight line
    losses: list[float] = field(default_factory=list)  # mean per token, one a step
    accuracies: dict[int, float] = field(default_factory=dict)  # by step
    push_seconds: list[float] = field(default_factory=list)
    push_bytes: int = 0


TENANTS = (
    Tenant("ada", "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, 1e-3),
    Tenant("grace", "products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, 1.5e-3),
)


def split_problems(dataset, held_out: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out problems; no question is in both."""
    by_question = {problem["question"]: problem for problem in dataset}
    problems = list(by_question.values())
    return problems[held_out:], problems[:held_out]


def prompt(problem: dict) -> str:
    """What the model sees."""
    return problem["question"] + "\n"


def measure(tenant: Tenant, dataset, problems: list[dict], sampler: SamplerClient, adapter_id: str) -> float:
    """Share of problems whose sampled answer the task's verifier accepts in full."""
    futures = [
        sampler.generate(prompt(problem), adapter_id=adapter_id, temperature=0.0, max_tokens=10) for problem in problems
    ]
    answers = [future.result().text.strip() for future in futures]
    return statistics.mean(
        dataset.score_answer(answer, problem) >= 1.0 for answer, problem in zip(answers, problems, strict=True)
    )


def train(
    tenant: Tenant,
    trainer: TrainerClient,
    sampler: SamplerClient,
    tokenizer,
    arguments: argparse.Namespace,
    progress: Progress,
) -> None:
    """One tenant's loop."""
    dataset = reasoning_gym.create_dataset(tenant.task, size=1000, seed=7, **tenant.options)
    training, held_out = split_problems(dataset, arguments.held_out)
    order = random.Random(0)
    order.shuffle(training)
    stream = itertools.cycle(training)
    bar = progress.add_task(f"{tenant.name}: {tenant.task}", total=arguments.steps, loss="", accuracy="")

    def show_accuracy(step: int, adapter_id: str) -> None:
        tenant.accuracies[step] = measure(tenant, dataset, held_out, sampler, adapter_id)
        progress.update(bar, accuracy=f"accuracy {tenant.accuracies[step]:.2f}")

    show_accuracy(0, adapter_id="")
    run = trainer.create_lora_adapter(tenant.name, rank=RANK, alpha=ALPHA)
    for step in range(1, arguments.steps + 1):
        batch = [
            Datum.from_prompt_and_completion(
                tokenizer(prompt(problem)).input_ids, [*tokenizer(problem["answer"]).input_ids, tokenizer.eos_token_id]
            )
            for problem in itertools.islice(stream, BATCH_SIZE)
        ]
        result = run.forward_backward(batch)
        run.optim_step(learning_rate=tenant.learning_rate * (1 - (step - 1) / arguments.steps))
        metrics = result.result().metrics
        tenant.losses.append(metrics["loss:mean"])
        progress.update(bar, advance=1, loss=f"loss {tenant.losses[-1]:.3f}")
        if step % arguments.push_every == 0 or step == arguments.steps:
            sync = run.sync_adapter_to_vllm().result()
            tenant.push_seconds.append(sync.seconds)
            tenant.push_bytes = sync.sent_bytes
            show_accuracy(step, tenant.name)


def show_table(tenants: tuple[Tenant, ...]) -> None:
    """The outcome, for people."""
    table = rich.table.Table(title="Two tenants, one model")
    for column in ("tenant", "task", "accuracy before", "after", "loss first", "last", "versions", "push, median"):
        table.add_column(column, justify="left" if column in ("tenant", "task") else "right")
    for tenant in tenants:
        accuracies = list(tenant.accuracies.values())
        table.add_row(
            tenant.name,
            tenant.task,
            f"{accuracies[0]:.2f}",
            f"{accuracies[-1]:.2f}",
            f"{tenant.losses[0]:.3f}",
            f"{tenant.losses[-1]:.3f}",
            str(len(tenant.push_seconds)),
            f"{1000 * statistics.median(tenant.push_seconds):.0f} ms for {tenant.push_bytes / 1e6:.1f} MB",
        )
    rich.print(table)


def draw(tenants: tuple[Tenant, ...], file: Path) -> None:
    """Loss and held-out accuracy over steps."""
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for tenant in tenants:
        label = f"{tenant.name}: {tenant.task}"
        loss.plot(range(1, len(tenant.losses) + 1), tenant.losses, label=label)
        accuracy.plot(list(tenant.accuracies), list(tenant.accuracies.values()), marker="o", label=label)
    loss.set(xlabel="step", ylabel="loss per answer token", yscale="log", title="Training in Megatron")
    accuracy.set(xlabel="step", ylabel="accuracy", ylim=(-0.03, 1.03), title="Held-out problems, sampled from vLLM")
    accuracy.legend()
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def summary(tenants: tuple[Tenant, ...], seconds: float, adapter_files: int) -> dict:
    """The outcome, for programs."""
    return {
        "seconds_total": round(seconds, 1),
        "tenants": [
            {
                "name": tenant.name,
                "task": tenant.task,
                "accuracy_before": tenant.accuracies[0],
                "accuracy_after": list(tenant.accuracies.values())[-1],
                "loss_first": tenant.losses[0],
                "loss_last": tenant.losses[-1],
                "versions": len(tenant.push_seconds),
            }
            for tenant in tenants
        ],
        "push": {
            "transport": "grpc",
            "bytes": max(tenant.push_bytes for tenant in tenants),
            "seconds_p50": statistics.median(itertools.chain(*(tenant.push_seconds for tenant in tenants))),
        },
        "adapter_files_written": adapter_files,
    }


def main() -> None:
    """Parses the command line and runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=ROOT / "out/demo")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--push-every", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=25, help="problems to measure accuracy on")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `with` below, which stops both services
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    readings = (TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[accuracy]}"), TimeElapsedColumn())
    services = LocalServices.for_model(
        str(arguments.model),
        trainer_listen=free_address(),
        sampler_listen=free_address(),
        dtype="float32",
        log_dir=arguments.out / "logs",
    )
    rich.print(f"Starting both services on {arguments.model.name}; their logs are in {services.log_dir}")
    # The watch begins when adapters can: before, vLLM's compiler writes files of an adapter's size.
    with services, AdapterFileWatch(ROOT) as watch, Progress(*columns, *readings) as progress:
        sampler_address, trainer_address = (spec.address for spec in services.specs)
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
        with (
            TrainerClient(trainer_address) as trainer,
            SamplerClient(sampler_address) as sampler,
            ThreadPoolExecutor(len(TENANTS)) as threads,
        ):
            loops = [
                threads.submit(train, tenant, trainer, sampler, tokenizer, arguments, progress) for tenant in TENANTS
            ]
            for loop in loops:
                loop.result()
    show_table(TENANTS)
    draw(TENANTS, arguments.out / "curves.png")
    outcome = summary(TENANTS, time.monotonic() - started, len(watch.adapter_files))
    (arguments.out / "summary.json").write_text(json.dumps(outcome, indent=2) + "\n")
    written = outcome["adapter_files_written"]
    rich.print(f"{arguments.out}/summary.json and curves.png; {written} adapter files written", *watch.adapter_files)


if __name__ == "__main__":
    main()
