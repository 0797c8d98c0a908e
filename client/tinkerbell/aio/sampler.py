"""The sampler's client for asyncio."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinkerbell import _decode, adapter, results
from tinkerbell._connection import Connection
from tinkerbell.errors import InternalError
from tinkerbell.inputs import Prompt, SamplingParams, set_prompt, token_array
from tinkerbell.lora import LoraConfig
from tinkerbell.push import push
from tinkerbell.v1 import sampler_pb2, sampler_pb2_grpc


class AsyncSamplerClient:
    """A connection to a sampler; see `tinkerbell.SamplerClient`."""

    def __init__(self, address: str, timeout: float | None = None):
        """`address`: HOST:PORT. `timeout`: seconds that each call may take; None means no limit."""
        self._connection = Connection("the sampler", address, timeout)
        self._stub = sampler_pb2_grpc.SamplerServiceStub(self._connection.channel)
        self._timeout = timeout

    async def __aenter__(self) -> "AsyncSamplerClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See `SamplerClient.close`."""
        await self._connection.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        adapter_id: str = "",
        version: int = 0,
        **overrides: Any,
    ) -> asyncio.Future[results.GenerateResult]:
        """See `SamplerClient.generate`."""
        return self._connection.start(
            self._generate(generate_request(prompt, sampling, adapter_id, version, overrides))
        )

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        adapter_id: str = "",
        version: int = 0,
        **overrides: Any,
    ) -> asyncio.Future[list[results.GenerateResult]]:
        """See `SamplerClient.generate_batch`."""
        return self._connection.start(
            self._generate_batch([generate_request(each, sampling, adapter_id, version, overrides) for each in prompts])
        )

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        adapter_id: str = "",
        version: int = 0,
        **overrides: Any,
    ) -> AsyncIterator[results.GenerateDelta]:
        """See `SamplerClient.stream`."""
        return self._deltas(generate_request(prompt, sampling, adapter_id, version, overrides))

    def compute_logprobs(
        self, sequences: Sequence[ArrayLike], adapter_id: str = "", version: int = 0
    ) -> asyncio.Future[results.LogprobsResult]:
        """See `SamplerClient.compute_logprobs`."""
        return self._connection.start(self._compute_logprobs(sequences, adapter_id, version))

    async def list_adapters(self) -> list[results.SampledAdapter]:
        """See `SamplerClient.list_adapters`."""
        response = await self._connection.call(self._stub.ListAdapters, sampler_pb2.ListAdaptersRequest())
        return [_decode.sampled_adapter(sampled) for sampled in response.adapters]

    async def unload_adapter(self, adapter_id: str, version: int = 0) -> list[int]:
        """See `SamplerClient.unload_adapter`."""
        request = sampler_pb2.UnloadAdapterRequest(adapter_id=adapter_id, version=version)
        response = await self._connection.call(self._stub.UnloadAdapter, request)
        return list(response.versions)

    async def lease_version(
        self, adapter_id: str, version: int = 0, *, ttl_seconds: float = 600.0, lease_id: str = ""
    ) -> results.Lease:
        """See `SamplerClient.lease_version`."""
        request = sampler_pb2.LeaseVersionRequest(
            adapter_id=adapter_id, version=version, ttl_seconds=ttl_seconds, lease_id=lease_id
        )
        response = await self._connection.call(self._stub.LeaseVersion, request)
        return results.Lease(response.lease_id, _decode.adapter_version(response.version))

    async def release_lease(self, lease_id: str) -> None:
        """See `SamplerClient.release_lease`."""
        await self._connection.call(self._stub.ReleaseLease, sampler_pb2.ReleaseLeaseRequest(lease_id=lease_id))

    async def get_backend_info(self) -> results.SamplerInfo:
        """See `SamplerClient.get_backend_info`."""
        request = sampler_pb2.SamplerServiceGetBackendInfoRequest()
        return _decode.sampler_info(await self._connection.call(self._stub.GetBackendInfo, request))

    async def push_adapter(
        self,
        adapter_id: str,
        version: int,
        weights: Mapping[str, np.ndarray],
        *,
        rank: int,
        alpha: float,
        base_model_fingerprint: str | None = None,
    ) -> results.PushResult:
        """See `SamplerClient.push_adapter`."""
        if base_model_fingerprint is None:
            base_model_fingerprint = (await self.get_backend_info()).base_model.fingerprint
        lora = LoraConfig.of_weights(weights, rank, alpha)
        manifest, payload = adapter.pack(weights, lora, base_model_fingerprint)
        begin = sampler_pb2.PushBegin(adapter_id=adapter_id, version=version, manifest=manifest)
        return _decode.push_result(await push(self._connection.channel, begin, payload, timeout=self._timeout))

    # The parts below start nothing: the blocking client shares them and runs them on its own loop.

    async def _generate(self, request: sampler_pb2.GenerateRequest) -> results.GenerateResult:
        return _decode.generate_result([delta async for delta in self._deltas(request)])

    async def _generate_batch(self, requests: Sequence[sampler_pb2.GenerateRequest]) -> list[results.GenerateResult]:
        whole: dict[int, results.GenerateResult] = {}
        request = sampler_pb2.GenerateBatchRequest(requests=requests)
        async with contextlib.aclosing(self._connection.stream(self._stub.GenerateBatch, request)) as messages:
            async for message in messages:
                whole[message.index] = _decode.batch_result(message)
        if len(whole) != len(requests):
            raise InternalError(f"the sampler ended the call with {len(whole)} of {len(requests)} results")
        return [whole[index] for index in range(len(requests))]

    async def _deltas(self, request: sampler_pb2.GenerateRequest) -> AsyncGenerator[results.GenerateDelta, None]:
        async with contextlib.aclosing(self._connection.stream(self._stub.Generate, request)) as messages:
            async for message in messages:
                yield _decode.generate_delta(message)

    def _compute_logprobs(
        self, sequences: Sequence[ArrayLike], adapter_id: str, version: int
    ) -> Coroutine[Any, Any, results.LogprobsResult]:
        request = sampler_pb2.ComputeLogprobsRequest(adapter_id=adapter_id, version=version)
        for number, sequence in enumerate(sequences):
            tokens = token_array(sequence, f"sequence {number}", np.int32)
            request.sequences.add(tokens=tokens.tolist())
        return self._score(request)

    async def _score(self, request: sampler_pb2.ComputeLogprobsRequest) -> results.LogprobsResult:
        return _decode.logprobs_result(await self._connection.call(self._stub.ComputeLogprobs, request))


def generate_request(
    prompt: Prompt,
    sampling: SamplingParams | None,
    adapter_id: str,
    version: int,
    overrides: Mapping[str, Any],
) -> sampler_pb2.GenerateRequest:
    """The request for completions. ValueError or TypeError when the prompt or a parameter is none."""
    sampling = dataclasses.replace(sampling or SamplingParams(), **overrides)
    request = sampler_pb2.GenerateRequest(adapter_id=adapter_id, version=version, sampling=sampling.to_proto())
    set_prompt(request, prompt)
    return request
