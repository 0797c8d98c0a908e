"""Supervised fine-tuning: an adapter learns to add, and to give the sum without a sentence around it.

    python -m examples.sft [--trainer HOST:PORT --sampler HOST:PORT]

The problems are reasoning-gym's chain_sum, two terms of one digit. Accuracy is measured by sampling problems that the
adapter has not seen, before training and after it, when its weights have gone to the sampler in memory.
"""

import itertools
import random

import reasoning_gym
import rich
import rich.table
import transformers
import typer
from matplotlib.figure import Figure

from examples import support
from tinkerbell import Datum, SamplerClient, TrainerClient

RANK, ALPHA = 16, 32.0
LEARNING_RATE = 1e-3  # of the first step; it falls to zero in a straight line
BATCH_SIZE = 8
HELD_OUT = 32


def prompt(problem: dict) -> str:
    """What the model sees."""
    return problem["question"] + "\n"


def accuracy(sampler: SamplerClient, problems: list[dict], adapter_id: str = "") -> float:
    """Share of the problems that are answered by the right number and nothing else."""
    futures = [
        sampler.generate(prompt(problem), adapter_id=adapter_id, temperature=0, max_tokens=10) for problem in problems
    ]
    answers = [future.result().text.strip() for future in futures]
    return sum(answer == problem["answer"] for answer, problem in zip(answers, problems, strict=True)) / len(problems)


def main(
    trainer_address: support.TrainerAddress = "",
    sampler_address: support.SamplerAddress = "",
    steps: support.Steps = 60,
    out: support.OutFolder = support.OUT / "sft",
) -> list[float]:
    """Fine-tunes an adapter on sums. Returns the loss of each step, in nats per answer token."""
    dataset = reasoning_gym.create_dataset(
        "chain_sum", size=1000, seed=7, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    problems = list({problem["question"]: problem for problem in dataset}.values())
    held_out, training = problems[:HELD_OUT], problems[HELD_OUT:]
    random.Random(0).shuffle(training)
    stream = itertools.cycle(training)
    losses = []
    with (
        support.services(trainer_address, sampler_address, out) as services,
        TrainerClient(services.trainer) as trainer,
        SamplerClient(services.sampler) as sampler,
        support.progress_bar() as progress,
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(sampler.get_backend_info().base_model.name)
        before = accuracy(sampler, held_out)
        run = trainer.create_lora_adapter(support.new_name("sft"), rank=RANK, alpha=ALPHA)
        bar = progress.add_task(run.adapter_id, total=steps, reading="")
        for step in range(steps):
            batch = [
                Datum.from_prompt_and_completion(
                    tokenizer(prompt(problem)).input_ids,
                    [*tokenizer(problem["answer"]).input_ids, tokenizer.eos_token_id],
                )
                for problem in itertools.islice(stream, BATCH_SIZE)
            ]
            result = run.forward_backward(batch)
            run.optim_step(learning_rate=LEARNING_RATE * (1 - step / steps))
            losses.append(result.result().loss)
            progress.update(bar, advance=1, reading=f"loss {losses[-1]:.3f}")
        version = run.sync_adapter_to_vllm().result()
        after = accuracy(sampler, held_out, run.adapter_id)
        run.remove()  # from the trainer; the sampler keeps the version

    table = rich.table.Table("", "before", "after", title=f"{run.adapter_id}, version {version.version}")
    table.add_row("loss per answer token", f"{losses[0]:.3f}", f"{losses[-1]:.3f}")
    table.add_row(f"accuracy on {HELD_OUT} held-out problems", f"{before:.2f}", f"{after:.2f}")
    rich.print(table)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, steps + 1), losses)
    axes.set(xlabel="step", ylabel="loss per answer token, nats", yscale="log", title="Supervised fine-tuning")
    axes.grid(alpha=0.3)
    figure.savefig(out / "loss.png", dpi=120)
    rich.print(f"{out}/loss.png")
    return losses


if __name__ == "__main__":
    typer.run(main)
