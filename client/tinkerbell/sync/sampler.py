"""The sampler's client for programs that block."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinkerbell import results
from tinkerbell._background import loop_thread
from tinkerbell.aio.sampler import AsyncSamplerClient, generate_request
from tinkerbell.inputs import Prompt, SamplingParams


class SamplerClient:
    """A connection to a sampler.

        with SamplerClient("localhost:50052") as sampler:
            futures = [sampler.generate(prompt, adapter_id="alice", max_tokens=64) for prompt in prompts]
            for future in futures:
                print(future.result().text)

    An empty `adapter_id` means the bare base model; `version` 0 means the adapter's latest one when the request is
    admitted. A request runs on one version to its end, and its result says which.

    Nothing is sent before the first call. A call to a sampler that can't be reached raises UnavailableError at once;
    calls that only read are tried a few times first. `tinkerbell.errors` lists what else a call can raise.
    """

    def __init__(self, address: str, timeout: float | None = None):
        """`address`: HOST:PORT. `timeout`: seconds that each call may take; None means no limit."""

        async def connect() -> AsyncSamplerClient:
            return AsyncSamplerClient(address, timeout)

        self._loop = loop_thread()
        self._client = self._loop.run(connect())

    def __enter__(self) -> "SamplerClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Wait for the futures you care about first: calls still running are cancelled."""
        self._loop.run(self._client.close())

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        adapter_id: str = "",
        version: int = 0,
        **overrides: Any,
    ) -> Future[results.GenerateResult]:
        """Completions of one prompt. Cancelling the future stops the work.

        `prompt`: text; token ids; or chat messages, which the base model's chat template lays out. Parameters come as
        SamplingParams, as its fields by keyword, or both, where keywords win: `generate("Once", max_tokens=64)`.
        TypeError on a keyword that is not a field.
        """
        return self._loop.submit(
            self._client._generate(generate_request(prompt, sampling, adapter_id, version, overrides))
        )

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        adapter_id: str = "",
        version: int = 0,
        **overrides: Any,
    ) -> Future[list[results.GenerateResult]]:
        """As `generate`, for at least one prompt in one call: the results are in the prompts' order.

        All prompts are admitted at one moment, hence on one version, or none is: ResourceExhaustedError, with
        `retry_seconds`, when the sampler has no room for all their completions.
        """
        requests = [generate_request(each, sampling, adapter_id, version, overrides) for each in prompts]
        return self._loop.submit(self._client._generate_batch(requests))

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        adapter_id: str = "",
        version: int = 0,
        **overrides: Any,
    ) -> Iterator[results.GenerateDelta]:
        """As `generate`, but token by token, in order within each completion. Leaving the loop stops the work."""
        return self._loop.iterate(
            self._client._deltas(generate_request(prompt, sampling, adapter_id, version, overrides))
        )

    def compute_logprobs(
        self, sequences: Sequence[ArrayLike], adapter_id: str = "", version: int = 0
    ) -> Future[results.LogprobsResult]:
        """Scores the tokens of each sequence, at least two long, given those before them."""
        return self._loop.submit(self._client._compute_logprobs(sequences, adapter_id, version))

    def list_adapters(self) -> list[results.SampledAdapter]:
        """The adapters in order of name, with their live versions."""
        return self._loop.run(self._client.list_adapters())

    def unload_adapter(self, adapter_id: str, version: int = 0) -> list[int]:
        """Unloads one version, or all of them when `version` is 0, and lists what was unloaded in ascending order.

        Requests that run on a version finish on it.
        """
        return self._loop.run(self._client.unload_adapter(adapter_id, version))

    def lease_version(
        self, adapter_id: str, version: int = 0, *, ttl_seconds: float = 600.0, lease_id: str = ""
    ) -> results.Lease:
        """Keeps a version (0 for the latest) live for a while, however many newer ones come.

        `ttl_seconds`: from now on, at most a day. `lease_id`: prolongs that lease. A lease is of one sampler and ends
        with it.
        """
        return self._loop.run(
            self._client.lease_version(adapter_id, version, ttl_seconds=ttl_seconds, lease_id=lease_id)
        )

    def release_lease(self, lease_id: str) -> None:
        """Ends a lease early."""
        self._loop.run(self._client.release_lease(lease_id))

    def get_backend_info(self) -> results.SamplerInfo:
        """Base model, device, versions and limits of the sampler."""
        return self._loop.run(self._client.get_backend_info())

    def push_adapter(
        self,
        adapter_id: str,
        version: int,
        weights: Mapping[str, np.ndarray],
        *,
        rank: int,
        alpha: float,
        base_model_fingerprint: str | None = None,
    ) -> results.PushResult:
        """Installs a version from this process's memory, for weights that no trainer here has made.

        `version`: above the adapter's latest. `weights`: by PEFT name, A [rank, in] and B [out, rank], all float32 or
        all float16. `base_model_fingerprint`: of the model that the weights belong to; None asks the sampler, which
        skips the check that they fit. The same version with the same weights is a success that moves no bytes;
        with others, AlreadyExistsError.
        """
        return self._loop.run(
            self._client.push_adapter(
                adapter_id, version, weights, rank=rank, alpha=alpha, base_model_fingerprint=base_model_fingerprint
            )
        )
