"""SamplerService over gRPC: proto in, one call, proto out."""

import contextlib
from collections.abc import AsyncIterator, Iterable

import grpc

from sampler_service.push import AlreadyLive, Push
from sampler_service.requests import (
    ChatPrompt,
    Delta,
    Finish,
    Position,
    Prompt,
    Request,
    Sampling,
    Structure,
    TextPrompt,
    TokenPrompt,
)
from sampler_service.sampler import Generation, Result, Sampler
from sampler_service.versions import Version
from service_common import errors, failpoints
from service_common.lora import TARGET_MODULES
from tinkerbell import payload, push_frames, tensors
from tinkerbell.payload import Chunk
from tinkerbell.v1 import sampler_pb2, sampler_pb2_grpc

SERVICE_NAME = sampler_pb2.DESCRIPTOR.services_by_name["SamplerService"].full_name

_FINISH_REASONS = {
    None: sampler_pb2.FINISH_REASON_UNSPECIFIED,
    Finish.STOP: sampler_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: sampler_pb2.FINISH_REASON_LENGTH,
}


class SamplerServicer(sampler_pb2_grpc.SamplerServiceServicer):
    """Answers UNAVAILABLE (ENGINE_LOADING) until it is given a sampler."""

    def __init__(self) -> None:
        self._loaded: Sampler | None = None

    def attach(self, sampler: Sampler) -> None:
        """Starts answering."""
        self._loaded = sampler

    @property
    def _sampler(self) -> Sampler:
        if self._loaded is None:
            raise errors.unavailable("ENGINE_LOADING", "the base model is still being loaded; try again in a minute")
        return self._loaded

    async def PushAdapter(
        self, request_iterator: AsyncIterator[sampler_pb2.PushAdapterRequest | Chunk], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[sampler_pb2.PushAdapterResponse]:
        sampler = self._sampler
        first = await anext(aiter(request_iterator), sampler_pb2.PushAdapterRequest())
        if isinstance(first, Chunk) or not first.HasField("begin"):
            raise _unexpected_frame("a push starts with BEGIN", first)
        begin = first.begin
        if begin.device_memory_id:
            sampler.device_memory.check(begin.device_memory_id, begin.manifest.size_bytes)
        push = sampler.pushes.begin(begin.adapter_id, begin.version, begin.manifest, begin.device_memory_id)
        if isinstance(push, AlreadyLive):
            yield self._committed(push.version, already_live=True)
            return
        await failpoints.reached("push.begun")
        try:
            accepted = sampler_pb2.PushAccepted(lane_ports=sampler.pushes.lanes.ports())
            yield sampler_pb2.PushAdapterResponse(accepted=accepted)
            async for request in request_iterator:
                if isinstance(request, Chunk):
                    push.add(request)
                    await failpoints.reached("push.chunk")
                    continue
                match request.WhichOneof("frame"):
                    case "part":
                        push.add_part(request.part)
                        await failpoints.reached("push.chunk")
                    case "prepare":
                        yield await self._prepared(push, request.prepare)
                    case "commit":
                        live = await push.commit()
                        await failpoints.reached("push.committed")
                        yield self._committed(live, already_live=False)
                        return
                    case _:
                        raise _unexpected_frame("CHUNK, PART, PREPARE or COMMIT follows BEGIN", request)
            # A stream that was cut looks just like one that was closed.
            raise errors.aborted("PUSH_NOT_COMMITTED", "the push ended without COMMIT; nothing was installed")
        finally:
            push.close()

    async def OpenDeviceMemory(
        self, request: sampler_pb2.OpenDeviceMemoryRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[sampler_pb2.OpenDeviceMemoryResponse]:
        memory = self._sampler.device_memory
        async with memory.opened(request.handle, request.size_bytes, request.host) as memory_id:
            yield sampler_pb2.OpenDeviceMemoryResponse(memory_id=memory_id)
            await memory.ending.wait()  # or until the caller ends the call

    async def ListAdapters(
        self, request: sampler_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> sampler_pb2.ListAdaptersResponse:
        response = sampler_pb2.ListAdaptersResponse()
        for adapter_id, versions in self._sampler.registry.adapters().items():
            adapter = response.adapters.add(adapter_id=adapter_id, latest_version=versions[-1].version.version)
            for live in versions:
                adapter.versions.add(
                    version=live.version.version,
                    digest=live.version.digest,
                    lora=live.version.lora,
                    size_bytes=live.version.manifest.size_bytes,
                    active_requests=live.active_requests,
                    leases=live.leases,
                )
        return response

    async def UnloadAdapter(
        self, request: sampler_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> sampler_pb2.UnloadAdapterResponse:
        return sampler_pb2.UnloadAdapterResponse(
            versions=self._sampler.registry.unload(request.adapter_id, request.version)
        )

    async def ExportAdapterVersion(
        self, request: sampler_pb2.ExportAdapterVersionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[sampler_pb2.ExportAdapterVersionResponse]:
        with self._sampler.registry.use(request.adapter_id, request.version) as version:
            head = sampler_pb2.ExportedVersion(version=self._served_by(version), manifest=version.manifest)
            yield sampler_pb2.ExportAdapterVersionResponse(head=head)
            for chunk in payload.chunks(await self._sampler.payload(version)):
                yield sampler_pb2.ExportAdapterVersionResponse(chunk=chunk)

    async def LeaseVersion(
        self, request: sampler_pb2.LeaseVersionRequest, context: grpc.aio.ServicerContext
    ) -> sampler_pb2.LeaseVersionResponse:
        lease_id, version = self._sampler.leases.acquire(
            request.adapter_id, request.version, request.ttl_seconds, request.lease_id
        )
        return sampler_pb2.LeaseVersionResponse(lease_id=lease_id, version=self._served_by(version))

    async def ReleaseLease(
        self, request: sampler_pb2.ReleaseLeaseRequest, context: grpc.aio.ServicerContext
    ) -> sampler_pb2.ReleaseLeaseResponse:
        self._sampler.leases.release(request.lease_id)
        return sampler_pb2.ReleaseLeaseResponse()

    async def ConfirmCurrent(
        self, request: sampler_pb2.ConfirmCurrentRequest, context: grpc.aio.ServicerContext
    ) -> sampler_pb2.ConfirmCurrentResponse:
        self._sampler.current.set()
        return sampler_pb2.ConfirmCurrentResponse()

    async def Generate(
        self, request: sampler_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[sampler_pb2.GenerateResponse]:
        async with self._sampler.generate(_request(request)) as generation:
            async for delta in generation.deltas:
                yield self._response(generation, delta)

    async def GenerateBatch(
        self, request: sampler_pb2.GenerateBatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[sampler_pb2.GenerateBatchResponse]:
        requests = [_request(each) for each in request.requests]
        async with contextlib.aclosing(self._sampler.generate_batch(requests)) as results:
            async for result in results:
                yield self._result(result)

    async def ComputeLogprobs(
        self, request: sampler_pb2.ComputeLogprobsRequest, context: grpc.aio.ServicerContext
    ) -> sampler_pb2.ComputeLogprobsResponse:
        served_by, logprobs = await self._sampler.compute_logprobs(
            request.adapter_id, request.version, [sequence.tokens for sequence in request.sequences]
        )
        return sampler_pb2.ComputeLogprobsResponse(
            served_by=self._served_by(served_by), logprobs=[tensors.encode(array) for array in logprobs]
        )

    async def GetBackendInfo(
        self, request: sampler_pb2.SamplerServiceGetBackendInfoRequest, context: grpc.aio.ServicerContext
    ) -> sampler_pb2.SamplerServiceGetBackendInfoResponse:
        sampler = self._sampler
        return sampler_pb2.SamplerServiceGetBackendInfoResponse(
            base_model=sampler.base_model,
            device=sampler.device,
            versions=sampler.package_versions,
            max_rank=sampler.config.max_rank,
            max_loras=sampler.config.max_loras,
            keep_versions=sampler.config.keep_versions,
            active_requests=sampler.active_requests,
            target_modules=TARGET_MODULES,
            instance_id=sampler.instance_id,
            cuda_ipc_host=sampler.device_memory.host,
            max_sequences=sampler.config.max_sequences,
            active_sequences=sampler.active_sequences,
        )

    def _served_by(self, version: Version | None) -> sampler_pb2.AdapterVersion:
        base_model = self._sampler.base_model.fingerprint
        if version is None:
            return sampler_pb2.AdapterVersion(digest=base_model, base_model_fingerprint=base_model)
        return sampler_pb2.AdapterVersion(
            adapter_id=version.adapter_id,
            version=version.version,
            digest=version.digest,
            base_model_fingerprint=base_model,
        )

    async def _prepared(self, push: Push, request: sampler_pb2.PushPrepare) -> sampler_pb2.PushAdapterResponse:
        probes = [probe.tokens for probe in request.probes]
        self._sampler.check_sequences(probes, "prepare.probes")
        logprobs = await self._sampler.score(probes, await push.prepare())
        await failpoints.reached("push.prepared")
        return sampler_pb2.PushAdapterResponse(
            prepared=sampler_pb2.PushPrepared(logprobs=[tensors.encode(array) for array in logprobs])
        )

    def _committed(self, version: Version, already_live: bool) -> sampler_pb2.PushAdapterResponse:
        return sampler_pb2.PushAdapterResponse(
            committed=sampler_pb2.PushCommitted(version=self._served_by(version), already_live=already_live)
        )

    def _response(self, generation: Generation, delta: Delta) -> sampler_pb2.GenerateResponse:
        return sampler_pb2.GenerateResponse(
            served_by=self._served_by(generation.served_by),
            index=delta.index,
            tokens=delta.tokens,
            text=delta.text,
            finish_reason=_FINISH_REASONS[delta.finish],
            prompt_tokens=generation.prompt_tokens,
            logprobs=_positions(delta.logprobs),
            prompt_logprobs=_positions(delta.prompt_logprobs),
        )

    def _result(self, result: Result) -> sampler_pb2.GenerateBatchResponse:
        return sampler_pb2.GenerateBatchResponse(
            index=result.index,
            served_by=self._served_by(result.served_by),
            completions=[
                sampler_pb2.Completion(
                    tokens=completion.tokens,
                    text=completion.text,
                    logprobs=_positions(completion.logprobs),
                    finish_reason=_FINISH_REASONS[completion.finish],
                )
                for completion in result.completions
            ],
            prompt_tokens=result.prompt_tokens,
            prompt_logprobs=_positions(result.prompt_logprobs),
        )


def add_to_server(servicer: SamplerServicer, server: grpc.aio.Server) -> None:
    """Registers the service; PushAdapter with a parser of its own, which takes the generated one's place."""
    sampler_pb2_grpc.add_SamplerServiceServicer_to_server(servicer, server)
    push = grpc.stream_stream_rpc_method_handler(
        servicer.PushAdapter, push_frames.parsed, sampler_pb2.PushAdapterResponse.SerializeToString
    )
    server.add_registered_method_handlers(SERVICE_NAME, {"PushAdapter": push})


def _positions(positions: Iterable[Position]) -> list[sampler_pb2.PositionLogprobs]:
    return [
        sampler_pb2.PositionLogprobs(
            logprob=position.logprob,
            top=[sampler_pb2.TokenLogprob(token=token, logprob=logprob) for token, logprob in position.top],
        )
        for position in positions
    ]


def _request(request: sampler_pb2.GenerateRequest) -> Request:
    return Request(request.adapter_id, request.version, _prompt(request), _sampling(request.sampling))


def _prompt(request: sampler_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return TextPrompt(request.text)
        case "chat":
            return ChatPrompt([(message.role, message.content) for message in request.chat.messages])
        case _:  # without any it is empty, and refused as such
            return TokenPrompt(request.tokens.tokens)


_OPTIONAL = [field.name for field in sampler_pb2.SamplingParams.DESCRIPTOR.fields if field.has_presence]


def _sampling(params: sampler_pb2.SamplingParams) -> Sampling:
    kind = params.WhichOneof("structure")
    structure = None
    if kind:
        value = getattr(params, kind)
        structure = Structure(kind, tuple(value.options) if kind == "choice" else value)
    given = {name: getattr(params, name) for name in _OPTIONAL if params.HasField(name) and name != kind}
    return Sampling(
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        logit_bias=dict(params.logit_bias),
        structure=structure,
        **given,
    )


def _unexpected_frame(rule: str, request: sampler_pb2.PushAdapterRequest | Chunk) -> errors.ServiceError:
    frame = "chunk" if isinstance(request, Chunk) else request.WhichOneof("frame") or "none"
    return errors.invalid_argument(
        "FRAME_UNEXPECTED", f"{rule}, and this frame is {frame.upper()}", field="frame", frame=frame
    )
