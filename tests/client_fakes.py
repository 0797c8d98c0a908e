"""A trainer and a sampler without engines, served as the real ones are, for tests of the client."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np

from service_common import errors
from service_common.rpc import Server
from tinkerbell import adapter, payload, tensors
from tinkerbell.local import free_address
from tinkerbell.lora import LoraConfig
from tinkerbell.v1 import common_pb2, sampler_pb2, sampler_pb2_grpc, trainer_pb2, trainer_pb2_grpc

FINGERPRINT = "f" * 64
BASE_MODEL = common_pb2.BaseModelInfo(
    name="tiny", architecture="LlamaForCausalLM", fingerprint=FINGERPRINT, vocab_size=512, dtype="DATA_TYPE_BFLOAT16"
)
WEIGHTS = {
    f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{half}.weight": np.random.default_rng(layer)
    .standard_normal(shape)
    .astype(np.float32)
    for layer in range(40)
    for half, shape in (("A", (8, 700)), ("B", (900, 8)))
}
LORA = LoraConfig.of_weights(WEIGHTS, 8, 16.0)


class FakeTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Remembers what it is asked; answers with what it was asked, and a repeated request with its first answer."""

    def __init__(self):
        self.adapters: dict[str, trainer_pb2.LoraAdapter] = {}
        self.weights, self.lora, self.fingerprint = WEIGHTS, LORA, FINGERPRINT
        self.imported: dict[str, tuple[common_pb2.AdapterManifest, bytes]] = {}
        self.checkpoints: dict[str, trainer_pb2.Checkpoint] = {}
        self.requests: list = []  # operations that were done, once each
        self.attempts: list = []  # mutations as they arrived
        self.answers: dict[str, Any] = {}
        self.lost_answers = 0
        self.refusal: errors.ServiceError | None = None
        self.damage: str | None = None
        self.gate = threading.Event()
        self.gate.set()

    def seq_ids(self) -> list[int]:
        return [request.seq_id for request in self.requests]

    async def _mutate(self, request, context, work: Callable[[], Any]) -> Any:
        """Does the work once a request_id, and loses the answer when it is told to."""
        assert len(request.request_id) == 32, request
        self.attempts.append(request)
        if self.refusal:
            raise self.refusal
        if request.request_id not in self.answers:
            if hasattr(request, "seq_id"):
                self.requests.append(request)
            self.answers[request.request_id] = work()
        if self.lost_answers:
            self.lost_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        return self.answers[request.request_id]

    async def InitializeBaseModel(self, request, context):
        stages = trainer_pb2.InitializeBaseModelResponse.Stage
        yield trainer_pb2.InitializeBaseModelResponse(stage=stages.STAGE_BUILDING, elapsed_seconds=0.25)
        yield trainer_pb2.InitializeBaseModelResponse(stage=stages.STAGE_READY, base_model=BASE_MODEL)

    async def GetBackendInfo(self, request, context):
        return trainer_pb2.TrainerServiceGetBackendInfoResponse(
            base_model=BASE_MODEL,
            device="cpu",
            parallelism=trainer_pb2.Parallelism(world_size=8, tensor=2, pipeline=2, data=2, sequence_parallel=True),
            versions={"torch": "2.11.0"},
            num_adapters=9,
            num_resident_adapters=3,
            max_adapters=1000,
            max_resident_adapters=4,
            max_rank=64,
            target_modules=["q_proj"],
        )

    async def CreateLoraAdapter(self, request, context):
        def create():
            if request.adapter_id in self.adapters:
                raise errors.already_exists(
                    "ADAPTER_EXISTS", f"adapter {request.adapter_id!r} exists", adapter_id=request.adapter_id
                )
            made = trainer_pb2.LoraAdapter(adapter_id=request.adapter_id, lora=request.lora, next_seq_id=1)
            self.adapters[request.adapter_id] = made
            return trainer_pb2.CreateLoraAdapterResponse(adapter=made)

        return await self._mutate(request, context, create)

    async def ListLoraAdapters(self, request, context):
        return trainer_pb2.ListLoraAdaptersResponse(adapters=self.adapters.values())

    async def RemoveLoraAdapter(self, request, context):
        def remove():
            if self.adapters.pop(request.adapter_id, None) is None:
                raise errors.not_found("ADAPTER_NOT_FOUND", "no such adapter", adapter_id=request.adapter_id)
            return trainer_pb2.RemoveLoraAdapterResponse()

        return await self._mutate(request, context, remove)

    async def ImportAdapterWeights(self, request_iterator, context):
        begin = (await anext(request_iterator)).begin
        if begin.request_id not in self.answers and not self.refusal:
            content = bytearray(begin.manifest.size_bytes)
            receiver = payload.Receiver(begin.manifest, content)
            async for frame in request_iterator:
                if frame.HasField("commit"):
                    receiver.finish()
                    break
                receiver.add(frame.chunk)
            else:
                return None

        def install():
            self.imported[begin.adapter_id] = begin.manifest, bytes(content)
            made = trainer_pb2.LoraAdapter(
                adapter_id=begin.adapter_id, lora=begin.manifest.lora, next_seq_id=begin.seq_id + 1
            )
            self.adapters[begin.adapter_id] = made
            return trainer_pb2.ImportAdapterWeightsResponse(adapter=made)

        return await self._mutate(begin, context, install)

    async def Forward(self, request, context):
        answer = trainer_pb2.ForwardResponse(outputs=_outputs(request), metrics={"loss:mean": 1.5})
        return await self._mutate(request, context, lambda: answer)

    async def ForwardBackward(self, request, context):
        answer = trainer_pb2.ForwardBackwardResponse(outputs=_outputs(request), metrics={"loss:sum": 2.5})
        answer = await self._mutate(request, context, lambda: answer)
        await asyncio.to_thread(self.gate.wait)
        return answer

    async def OptimStep(self, request, context):
        if request.adam.learning_rate < 0:
            raise errors.invalid_argument("LEARNING_RATE_OUT_OF_RANGE", "negative", field="adam.learning_rate")
        answer = trainer_pb2.OptimStepResponse(step=request.seq_id, grad_norm=request.adam.grad_clip_norm)
        return await self._mutate(request, context, lambda: answer)

    async def GetOptimizerState(self, request, context):
        return trainer_pb2.GetOptimizerStateResponse(state=_optimizer_state(request.adapter_id))

    async def ListOptimizerStates(self, request, context):
        states = [trainer_pb2.OptimizerState(adapter_id=name) for name in self.adapters]
        return trainer_pb2.ListOptimizerStatesResponse(states=states)

    async def ExportOptimizerState(self, request, context):
        self.requests.append(request)
        yield trainer_pb2.ExportOptimizerStateResponse(state=_optimizer_state(request.adapter_id))
        for field, factor in (("first_moment", 2), ("second_moment", 3)):
            moments = {name: factor * array for name, array in self.weights.items()}
            manifest, whole = adapter.pack(moments, self.lora, self.fingerprint)
            yield trainer_pb2.ExportOptimizerStateResponse(**{field: manifest})
            for chunk in self._chunks(whole):
                yield trainer_pb2.ExportOptimizerStateResponse(chunk=chunk)

    async def ExportAdapterWeights(self, request, context):
        self.requests.append(request)
        manifest, whole = adapter.pack(self.weights, self.lora, self.fingerprint)
        if self.damage == "digest":
            manifest.digest = "0" * 64
        yield trainer_pb2.ExportAdapterWeightsResponse(manifest=manifest)
        for chunk in self._chunks(whole):
            if self.damage == "cut" and chunk.offset:
                return
            yield trainer_pb2.ExportAdapterWeightsResponse(chunk=chunk)

    def _chunks(self, whole):
        for chunk in payload.chunks(whole):
            if self.damage == "bit":
                chunk.data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            yield chunk

    async def SyncAdapter(self, request, context):
        answer = trainer_pb2.SyncAdapterResponse(version=7, digest="d", transport="TRANSPORT_GRPC", sent_bytes=10)
        answer.replicas.add(address="a:1", state="REPLICA_STATE_COMMITTED", sent_bytes=10)
        answer.replicas.add(address="b:1", state="REPLICA_STATE_DOWN", error="gone")
        if request.HasField("verify"):
            answer.replicas[0].difference.tokens = len(request.verify.sequences)
        return await self._mutate(request, context, lambda: answer)

    async def VerifyAdapter(self, request, context):
        difference = trainer_pb2.LogprobDifference(mean=request.verify.tolerance, max=2.0, tokens=3)
        replica = trainer_pb2.ReplicaVerification(address="a:1", difference=difference, agrees=True)
        return trainer_pb2.VerifyAdapterResponse(version=7, digest="d", steps_since=2, replicas=[replica])

    async def SaveCheckpoint(self, request, context):
        def save():
            saved = trainer_pb2.Checkpoint(
                checkpoint_id=f"{request.adapter_id}/{request.name or 'step-3'}",
                adapter_id=request.adapter_id,
                lora=self.lora.to_proto(),
                step=3,
                seq_id=request.seq_id,
                created_at=1.5e9,
                expires_at=request.ttl_seconds and 1.5e9 + request.ttl_seconds,
                size_bytes=2_500_000,
            )
            self.checkpoints[saved.checkpoint_id] = saved
            return trainer_pb2.SaveCheckpointResponse(checkpoint=saved)

        return await self._mutate(request, context, save)

    async def LoadCheckpoint(self, request, context):
        adapter_id = self.checkpoints[request.checkpoint_id].adapter_id
        loaded = trainer_pb2.LoraAdapter(adapter_id=adapter_id, step=3, next_seq_id=request.seq_id + 1, resident=True)
        return await self._mutate(request, context, lambda: trainer_pb2.LoadCheckpointResponse(adapter=loaded))

    async def ListCheckpoints(self, request, context):
        known = [one for one in self.checkpoints.values() if request.adapter_id in {"", one.adapter_id}]
        return trainer_pb2.ListCheckpointsResponse(checkpoints=known)

    async def DeleteCheckpoint(self, request, context):
        def delete():
            if self.checkpoints.pop(request.checkpoint_id, None) is None:
                raise errors.not_found("CHECKPOINT_NOT_FOUND", "no such checkpoint")
            return trainer_pb2.DeleteCheckpointResponse()

        return await self._mutate(request, context, delete)


class FakeSampler(sampler_pb2_grpc.SamplerServiceServicer):
    """Keeps pushed payloads; its completions are the prompt's tokens, one a message."""

    def __init__(self):
        self.pushed: dict[tuple[str, int], tuple[common_pb2.AdapterManifest, bytes]] = {}
        self.chunks = 0
        self.endless = False
        self.cancelled = threading.Event()
        self.generate_requests: list[sampler_pb2.GenerateRequest] = []
        self.cut_batch = False

    async def PushAdapter(self, request_iterator, context):
        begin = (await anext(request_iterator)).begin
        if begin.manifest.base_model_fingerprint != FINGERPRINT:
            raise errors.failed_precondition("BASE_MODEL_MISMATCH", "another base model")
        key = begin.adapter_id, begin.version
        committed = sampler_pb2.PushCommitted(
            version=sampler_pb2.AdapterVersion(
                adapter_id=begin.adapter_id, version=begin.version, digest=begin.manifest.digest
            ),
            already_live=key in self.pushed,
        )
        if key in self.pushed:
            if self.pushed[key][0].digest != begin.manifest.digest:
                raise errors.already_exists("VERSION_EXISTS", "that version is another one", version=begin.version)
            yield sampler_pb2.PushAdapterResponse(committed=committed)
            return
        yield sampler_pb2.PushAdapterResponse(accepted=sampler_pb2.PushAccepted())
        buffer = bytearray(begin.manifest.size_bytes)
        receiver = payload.Receiver(begin.manifest, buffer)
        async for frame in request_iterator:
            if frame.HasField("commit"):
                receiver.finish()
                self.pushed[key] = begin.manifest, bytes(buffer)
                yield sampler_pb2.PushAdapterResponse(committed=committed)
                return
            self.chunks += 1
            try:
                receiver.add(frame.chunk)
            except payload.PayloadError as cause:
                raise errors.data_loss("PAYLOAD_DAMAGED", str(cause)) from cause

    async def ListAdapters(self, request, context):
        adapters = [
            sampler_pb2.SampledAdapter(
                adapter_id=name,
                latest_version=version,
                versions=[sampler_pb2.LiveVersion(version=version, digest=manifest.digest, lora=manifest.lora)],
            )
            for (name, version), (manifest, _) in sorted(self.pushed.items())
        ]
        return sampler_pb2.ListAdaptersResponse(adapters=adapters)

    async def LeaseVersion(self, request, context):
        version = sampler_pb2.AdapterVersion(adapter_id=request.adapter_id, version=request.version or 9)
        lease_id = request.lease_id or f"for {request.ttl_seconds:g} s"
        return sampler_pb2.LeaseVersionResponse(lease_id=lease_id, version=version)

    async def ReleaseLease(self, request, context):
        raise errors.not_found("LEASE_NOT_FOUND", "it is over", lease_id=request.lease_id)

    async def UnloadAdapter(self, request, context):
        gone = [key for key in self.pushed if key[0] == request.adapter_id and request.version in {0, key[1]}]
        for key in gone:
            del self.pushed[key]
        return sampler_pb2.UnloadAdapterResponse(versions=[version for _, version in gone])

    async def Generate(self, request, context):
        self.generate_requests.append(request)
        served_by = sampler_pb2.AdapterVersion(adapter_id=request.adapter_id, version=request.version, digest="abc")
        words = request.text.split() or [str(token) for token in request.tokens.tokens] or ["hello"]
        common = {"served_by": served_by, "prompt_tokens": len(words)}
        try:
            while self.endless:
                yield sampler_pb2.GenerateResponse(tokens=[1], text="on ", **common)
                await asyncio.sleep(0.001)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        for position, word in enumerate(words):
            for index in range(request.sampling.n):
                last = position == len(words) - 1
                yield sampler_pb2.GenerateResponse(
                    index=index,
                    tokens=[position],
                    text=f"{word} ",
                    logprobs=[sampler_pb2.PositionLogprobs(logprob=-0.5)],
                    finish_reason="FINISH_REASON_STOP" if last else "FINISH_REASON_UNSPECIFIED",
                    **common,
                )

    async def GenerateBatch(self, request, context):
        if len(request.requests) > 8:
            raise errors.resource_exhausted("SAMPLER_FULL", "no room", retry_seconds=1.25, max_sequences=8)
        for index, each in reversed(list(enumerate(request.requests))):  # the last one is done first
            self.generate_requests.append(each)
            if self.cut_batch and index == 0:
                return
            completion = sampler_pb2.Completion(
                tokens=[index, 7],
                text=f"{each.text}!",
                logprobs=[sampler_pb2.PositionLogprobs(logprob=-0.5)] * 2,
                finish_reason="FINISH_REASON_LENGTH",
            )
            yield sampler_pb2.GenerateBatchResponse(
                index=index,
                served_by=sampler_pb2.AdapterVersion(adapter_id=each.adapter_id, version=3),
                completions=[completion] * each.sampling.n,
                prompt_tokens=5,
                prompt_logprobs=[sampler_pb2.PositionLogprobs(logprob=-1)],
            )

    async def ComputeLogprobs(self, request, context):
        scores = [-np.ones(len(sequence.tokens) - 1, np.float32) for sequence in request.sequences]
        served_by = sampler_pb2.AdapterVersion(adapter_id=request.adapter_id, version=request.version)
        return sampler_pb2.ComputeLogprobsResponse(
            served_by=served_by, logprobs=[tensors.encode(score) for score in scores]
        )

    async def GetBackendInfo(self, request, context):
        return sampler_pb2.SamplerServiceGetBackendInfoResponse(
            base_model=BASE_MODEL, device="cpu", versions={"vllm": "0.26.0"}, max_rank=64, target_modules=["q_proj"]
        )


class Fakes:
    """Both services, on a thread of their own."""

    def __init__(self):
        self.trainer, self.sampler = FakeTrainer(), FakeSampler()
        self.trainer_address, self.sampler_address = free_address(), free_address()

    @contextlib.contextmanager
    def running(self) -> Iterator["Fakes"]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        servers = asyncio.run_coroutine_threadsafe(self._start(), loop).result()
        try:
            yield self
        finally:
            self.trainer.gate.set()
            for server in servers:
                asyncio.run_coroutine_threadsafe(server.drain(0), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _start(self) -> list[Server]:
        trainer = Server(
            self.trainer_address,
            "tinkerbell.v1.TrainerService",
            lambda server: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(self.trainer, server),
        )
        sampler = Server(
            self.sampler_address,
            "tinkerbell.v1.SamplerService",
            lambda server: sampler_pb2_grpc.add_SamplerServiceServicer_to_server(self.sampler, server),
        )
        for server in (trainer, sampler):
            await server.start()
            await server.set_ready()
        return [trainer, sampler]


def _outputs(request) -> list[trainer_pb2.DatumOutput]:
    return [
        trainer_pb2.DatumOutput(logprobs=tensors.encode(-np.arange(len(datum.tokens), dtype=np.float32)))
        for datum in request.data
    ]


def _optimizer_state(adapter_id: str) -> trainer_pb2.OptimizerState:
    adam = trainer_pb2.AdamParams(learning_rate=0.5, beta1=0.1)
    return trainer_pb2.OptimizerState(adapter_id=adapter_id, step=3, last_adam=adam)
