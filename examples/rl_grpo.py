"""GRPO (DeepSeekMath, arXiv:2402.03300): an adapter learns sums from nothing but a score of what it says.

    python -m examples.rl_grpo [--trainer HOST:PORT --sampler HOST:PORT]

Each step publishes the weights to the sampler in memory, samples a group of answers to every problem from exactly that
version, scores them, and trains on each answer's advantage: its reward, less the mean of its group, over the group's
standard deviation. The sampler's own logprobs are the old ones in the ratio that PPO's loss clips. Of the paper's
objective two parts are left out, as many do since: the penalty on the distance to a reference model, and the division
by an answer's length, which goes easy on long wrong answers (arXiv:2503.20783).

The problems are reasoning-gym's chain_sum, two terms of one digit, and the reward is what its verifier says: 1 for the
right number, and for a longer text that has the number in it, the number's share of the text. So the untrained model
earns a little, mostly for answers that go on after the number.
"""

import dataclasses
import itertools
import random
import statistics

import numpy as np
import reasoning_gym
import rich
import rich.table
import transformers
import typer
from matplotlib.figure import Figure

from examples import support
from tinkerbell import Completion, Datum, SamplerClient, TrainerClient

RANK, ALPHA = 16, 32.0
LEARNING_RATE = 1.5e-4
PROMPTS, GROUP_SIZE = 6, 8  # a step's problems, and answers to each
MAX_TOKENS = 6


def policy_datum(prompt_tokens: list[int], completion: Completion, advantage: float) -> Datum:
    """An answer as it was sampled, every token of it as good as the whole."""
    datum = Datum.from_prompt_and_completion(prompt_tokens, completion.tokens)
    of_prompt = np.zeros(len(prompt_tokens) - 1)
    return dataclasses.replace(
        datum,
        logprobs=np.concatenate([of_prompt, [position.logprob for position in completion.logprobs]]),
        advantages=np.concatenate([of_prompt, np.full(len(completion.tokens), advantage)]),
    )


def main(
    trainer_address: support.TrainerAddress = "",
    sampler_address: support.SamplerAddress = "",
    steps: support.Steps = 30,
    out: support.OutFolder = support.OUT / "rl_grpo",
) -> list[float]:
    """Trains an adapter on sums by GRPO. Returns the mean reward of each step's samples."""
    dataset = reasoning_gym.create_dataset(
        "chain_sum", size=1000, seed=7, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    problems = list({problem["question"]: problem for problem in dataset}.values())
    random.Random(0).shuffle(problems)
    stream = itertools.cycle(problems)
    rewards: list[float] = []
    ratios: list[float] = []
    publish_seconds: list[float] = []
    with (
        support.services(trainer_address, sampler_address, out) as services,
        TrainerClient(services.trainer) as trainer,
        SamplerClient(services.sampler) as sampler,
        support.progress_bar() as progress,
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(sampler.get_backend_info().base_model.name)
        run = trainer.create_lora_adapter(support.new_name("grpo"), rank=RANK, alpha=ALPHA)
        bar = progress.add_task(run.adapter_id, total=steps, reading="")
        for _ in range(steps):
            policy = run.sync_adapter_to_vllm().result()
            batch = list(itertools.islice(stream, PROMPTS))
            prompts = [tokenizer(problem["question"]).input_ids for problem in batch]
            futures = [
                sampler.generate(
                    prompt_tokens,
                    adapter_id=run.adapter_id,
                    version=policy.version,
                    n=GROUP_SIZE,
                    max_tokens=MAX_TOKENS,
                    logprobs=0,  # the sampled tokens' own, without alternatives
                )
                for prompt_tokens in prompts
            ]
            data: list[Datum] = []
            scores: list[float] = []
            for problem, prompt_tokens, future in zip(batch, prompts, futures, strict=True):
                group = future.result().completions
                reward = np.array([dataset.score_answer(completion.text.strip(), problem) for completion in group])
                scores.extend(reward)
                if reward.std() > 0:  # a group that agrees teaches nothing
                    advantages = (reward - reward.mean()) / reward.std()
                    data.extend(map(policy_datum, itertools.repeat(prompt_tokens), group, advantages))
            if data:
                result = run.forward_backward(data, "ppo")
                run.optim_step(learning_rate=LEARNING_RATE)
                ratios.append(result.result().metrics["ratio:mean"])
            rewards.append(statistics.mean(scores))
            publish_seconds.append(policy.seconds)
            progress.update(bar, advance=1, reading=f"mean reward {rewards[-1]:.2f}")
        last = run.sync_adapter_to_vllm().result()
        run.remove()  # from the trainer; the sampler keeps the last versions

    few = min(5, steps)
    table = rich.table.Table("", "", title=f"{run.adapter_id}, version {last.version}")
    table.add_row(f"mean reward, first {few} steps", f"{statistics.mean(rewards[:few]):.2f}")
    table.add_row(f"mean reward, last {few} steps", f"{statistics.mean(rewards[-few:]):.2f}")
    table.add_row("publishing, median", f"{1000 * statistics.median(publish_seconds):.0f} ms")
    table.add_row("probability of a token, trainer's over sampler's, mean", f"{statistics.mean(ratios):.4f}")
    rich.print(table)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, steps + 1), rewards, alpha=0.3, label="of each step")
    axes.plot(range(few, steps + 1), np.convolve(rewards, np.full(few, 1 / few), "valid"), label=f"of {few} steps")
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1.03), title="GRPO")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out / "reward.png", dpi=120)
    rich.print(f"{out}/reward.png")
    return rewards


if __name__ == "__main__":
    typer.run(main)
