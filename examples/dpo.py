"""DPO (Rafailov et al., arXiv:2305.18290), a loss that this program differentiates itself.

    python -m examples.dpo [--trainer HOST:PORT --sampler HOST:PORT]

Both answers of a pair give the right sum: the chosen one as the bare number, the rejected one in a sentence. The
reference policy is the adapter's version 1, published before the first step: versions never change, so the sampler
scores each batch under it while the trainer works on the batch before, and would do so as well for an adapter that has
been fine-tuned already. The trainer computes the policy's logprobs, PyTorch the loss and its gradient here, and the
trainer takes that gradient through the model. No problem comes twice, so what is reported of a batch is of pairs that
the adapter has not seen.
"""

import itertools
import statistics
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import reasoning_gym
import rich
import rich.table
import torch
import transformers
import typer
from matplotlib.figure import Figure

from examples import support
from tinkerbell import Datum, LogprobsResult, SamplerClient, TrainerClient, torch_loss
from tinkerbell.custom_loss import CustomLoss

RANK, ALPHA = 16, 32.0
LEARNING_RATE = 3e-4
BETA = 0.1
PAIRS = 8  # a step


def pair(answer: str) -> tuple[str, str]:
    """What is chosen and what is rejected."""
    return f" {answer}", f" The answer is {answer}."


def margins(data: Sequence[Datum], policy: Sequence[torch.Tensor], reference: Sequence[np.ndarray]) -> torch.Tensor:
    """How much more reward each pair's chosen answer gets than its rejected one, [pairs].

    An answer's reward is beta * log(policy / reference). `data`: chosen, rejected, chosen, and so on; `policy` and
    `reference`: the logprobs of their tokens.
    """
    rewards = [
        BETA * ((scores - torch.tensor(frozen)) * torch.tensor(datum.weights)).sum()
        for datum, scores, frozen in zip(data, policy, reference, strict=True)
    ]
    return torch.stack(rewards[0::2]) - torch.stack(rewards[1::2])


def dpo_loss(reference: Sequence[np.ndarray]) -> CustomLoss:
    """-log sigmoid(margin), summed over the pairs."""
    return torch_loss(lambda data, policy: -torch.nn.functional.logsigmoid(margins(data, policy, reference)).sum())


def main(
    trainer_address: support.TrainerAddress = "",
    sampler_address: support.SamplerAddress = "",
    steps: support.Steps = 8,
    out: support.OutFolder = support.OUT / "dpo",
) -> list[float]:
    """Teaches an adapter by DPO to prefer bare numbers. Returns the mean reward margin of each step's pairs."""
    dataset = reasoning_gym.create_dataset(
        "chain_sum", size=2 * PAIRS * (steps + 1), seed=7, min_terms=2, max_terms=2, min_digits=2, max_digits=2
    )
    problems = iter({problem["question"]: problem for problem in dataset}.values())
    reward_margins: list[float] = []
    accuracies: list[float] = []
    with (
        support.services(trainer_address, sampler_address, out) as services,
        TrainerClient(services.trainer) as trainer,
        SamplerClient(services.sampler) as sampler,
        support.progress_bar() as progress,
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(sampler.get_backend_info().base_model.name)
        run = trainer.create_lora_adapter(support.new_name("dpo"), rank=RANK, alpha=ALPHA)
        first = run.sync_adapter_to_vllm().result()

        def next_pairs() -> tuple[list[Datum], Future[LogprobsResult]]:
            """Pairs that were not there before, and what the reference will say of them."""
            data, sequences = [], []
            for problem in itertools.islice(problems, PAIRS):
                prompt = tokenizer(f"{problem['metadata']['expression']} =").input_ids
                for answer in pair(problem["answer"]):
                    completion = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
                    data.append(Datum.from_prompt_and_completion(prompt, completion))
                    sequences.append(prompt + completion)
            return data, sampler.compute_logprobs(sequences, run.adapter_id, first.version)

        bar = progress.add_task(run.adapter_id, total=steps, reading="")
        coming = next_pairs()
        for _ in range(steps):
            data, scoring = coming
            reference = scoring.result().logprobs
            result = run.forward_backward_custom(data, dpo_loss(reference))
            run.optim_step(learning_rate=LEARNING_RATE)
            coming = next_pairs()  # scored while the trainer works
            policy = [torch.tensor(logprobs) for logprobs in result.result().logprobs]
            gained = margins(data, policy, reference)
            reward_margins.append(gained.mean().item())
            accuracies.append((gained > 0).float().mean().item())
            progress.update(bar, advance=1, reading=f"margin {reward_margins[-1]:.2f}, accuracy {accuracies[-1]:.2f}")
        last = run.sync_adapter_to_vllm().result()
        run.remove()  # from the trainer; the sampler keeps both versions

    few = min(5, steps)
    table = rich.table.Table("", f"first {few} steps", f"last {few}", title=f"{run.adapter_id}, version {last.version}")
    for name, values in (("reward margin", reward_margins), ("accuracy", accuracies)):
        table.add_row(name, f"{statistics.mean(values[:few]):.2f}", f"{statistics.mean(values[-few:]):.2f}")
    rich.print(table)

    figure = Figure(figsize=(10, 4), layout="constrained")
    margin, accuracy = figure.subplots(1, 2)
    margin.plot(range(1, steps + 1), reward_margins)
    margin.set(xlabel="step", ylabel="reward margin", title="DPO: chosen over rejected")
    accuracy.plot(range(1, steps + 1), accuracies)
    accuracy.set(xlabel="step", ylabel="share of pairs with a margin above 0", ylim=(0, 1.03), title="Accuracy")
    for axes in (margin, accuracy):
        axes.grid(alpha=0.3)
    figure.savefig(out / "dpo.png", dpi=120)
    rich.print(f"{out}/dpo.png")
    return reward_margins


if __name__ == "__main__":
    typer.run(main)
