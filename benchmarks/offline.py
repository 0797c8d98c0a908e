"""vLLM by itself: its LLM class generates from prompts with adapters that it loads from folders.

python -m benchmarks.offline '{"model": ..., "adapters": [FOLDER, ...], ...}' OUT writes OUT, JSON with the tokens per
second of each repetition, by the number of adapters that take turns. A process of its own, as vLLM's users have it, so
that the sampler's engine is not there yet or gone.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sampler_service import environment
from service_common.lora import TARGET_MODULES


@dataclass(frozen=True)
class Work:
    """What both sides generate: from `count` prompts of `prompt_tokens` random tokens, so many new ones each."""

    model: str
    adapters: Sequence[str]
    rank: int
    count: int
    new_tokens: int
    max_model_len: int
    vocab_size: int
    kv_cache_bytes: int
    gpu_memory_utilization: float
    repeats: int
    prompt_tokens: int = 16

    def prompts(self) -> list[list[int]]:
        """Always the same."""
        return np.random.default_rng(0).integers(0, self.vocab_size, (self.count, self.prompt_tokens)).tolist()

    def json(self) -> str:
        """For the command line."""
        return json.dumps(dataclasses.asdict(self))


def measure(work: Work) -> dict[int, list[float]]:
    """Tokens per second of each repetition, with the first adapter alone and with all of them in turn."""
    environment.prepare()
    import vllm  # noqa: PLC0415  (reads its environment when it is imported)
    from vllm.lora.request import LoRARequest  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    on_cpu = current_platform.is_cpu()
    llm = vllm.LLM(
        model=work.model,
        dtype="float32" if on_cpu else "bfloat16",
        max_model_len=work.max_model_len,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=len(work.adapters),
        max_lora_rank=work.rank,
        max_num_seqs=work.count,
        max_num_batched_tokens=8192,  # as in the sampler
        lora_target_modules=list(TARGET_MODULES),
        kv_cache_memory_bytes=work.kv_cache_bytes,
        gpu_memory_utilization=work.gpu_memory_utilization,
    )
    adapters = [LoRARequest(Path(folder).name, 1 + index, folder) for index, folder in enumerate(work.adapters)]
    prompts = [vllm.TokensPrompt(prompt_token_ids=tokens) for tokens in work.prompts()]
    parameters = vllm.SamplingParams(temperature=0, max_tokens=work.new_tokens, detokenize=False)
    rates: dict[int, list[float]] = {}
    for used in (adapters[:1], adapters):
        requests = [used[index % len(used)] for index in range(len(prompts))]
        for repeat in range(-1, work.repeats):
            started = time.perf_counter()
            outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=requests)
            seconds = time.perf_counter() - started
            if repeat >= 0:
                tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                rates.setdefault(len(used), []).append(tokens / seconds)
    return rates


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(Work(**json.loads(sys.argv[1])))))
