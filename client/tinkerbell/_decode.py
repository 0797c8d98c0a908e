"""Messages to results: one function per dataclass of `tinkerbell.results`."""

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from tinkerbell import results, tensors
from tinkerbell.errors import InternalError
from tinkerbell.inputs import AdamParams
from tinkerbell.lora import LoraConfig
from tinkerbell.v1 import common_pb2, sampler_pb2, trainer_pb2

_FINISH_REASONS: dict[int, results.FinishReason | None] = {
    sampler_pb2.FINISH_REASON_UNSPECIFIED: None,
    sampler_pb2.FINISH_REASON_STOP: "stop",
    sampler_pb2.FINISH_REASON_LENGTH: "length",
}

_REPLICA_STATES: dict[int, results.ReplicaState] = {
    trainer_pb2.REPLICA_STATE_COMMITTED: "committed",
    trainer_pb2.REPLICA_STATE_ALREADY_LIVE: "already_live",
    trainer_pb2.REPLICA_STATE_DOWN: "down",
}


def base_model_info(message: common_pb2.BaseModelInfo) -> results.BaseModelInfo:
    return results.BaseModelInfo(
        name=message.name,
        architecture=message.architecture,
        fingerprint=message.fingerprint,
        vocab_size=message.vocab_size,
        num_layers=message.num_layers,
        hidden_size=message.hidden_size,
        max_sequence_length=message.max_sequence_length,
        num_parameters=message.num_parameters,
        dtype=tensors.dtype_name(message.dtype),
    )


def load_progress(message: trainer_pb2.InitializeBaseModelResponse) -> results.LoadProgress:
    return results.LoadProgress(
        stage=_short_name(trainer_pb2.InitializeBaseModelResponse.Stage, message.stage, "STAGE_"),
        elapsed_seconds=message.elapsed_seconds,
        base_model=base_model_info(message.base_model) if message.HasField("base_model") else None,
    )


def loaded_model(last: results.LoadProgress | None) -> results.BaseModelInfo:
    """What the last message of a load must carry."""
    if last is None or last.base_model is None:
        raise InternalError("the trainer ended the load without describing the model")
    return last.base_model


def trainer_info(message: trainer_pb2.TrainerServiceGetBackendInfoResponse) -> results.TrainerInfo:
    return results.TrainerInfo(
        base_model=base_model_info(message.base_model) if message.HasField("base_model") else None,
        device=message.device,
        parallelism=results.Parallelism(
            world_size=message.parallelism.world_size,
            tensor=message.parallelism.tensor,
            pipeline=message.parallelism.pipeline,
            data=message.parallelism.data,
            sequence_parallel=message.parallelism.sequence_parallel,
        ),
        versions=dict(message.versions),
        num_adapters=message.num_adapters,
        num_resident_adapters=message.num_resident_adapters,
        max_adapters=message.max_adapters,
        max_resident_adapters=message.max_resident_adapters,
        max_rank=message.max_rank,
        max_batch_tokens=message.max_batch_tokens,
        sampler_addresses=tuple(message.sampler_addresses),
        target_modules=tuple(message.target_modules),
    )


def sampler_info(message: sampler_pb2.SamplerServiceGetBackendInfoResponse) -> results.SamplerInfo:
    return results.SamplerInfo(
        base_model=base_model_info(message.base_model),
        device=message.device,
        versions=dict(message.versions),
        max_rank=message.max_rank,
        max_loras=message.max_loras,
        keep_versions=message.keep_versions,
        active_requests=message.active_requests,
        target_modules=tuple(message.target_modules),
        max_sequences=message.max_sequences,
        active_sequences=message.active_sequences,
    )


def lora_adapter(message: trainer_pb2.LoraAdapter) -> results.LoraAdapter:
    return results.LoraAdapter(
        adapter_id=message.adapter_id,
        lora=LoraConfig.from_proto(message.lora),
        seed=message.seed,
        num_parameters=message.num_parameters,
        step=message.step,
        published_version=message.published_version,
        next_seq_id=message.next_seq_id,
        resident=message.resident,
    )


def forward_result(message: trainer_pb2.ForwardResponse) -> results.ForwardResult:
    return results.ForwardResult(
        logprobs=[tensors.decode(output.logprobs) for output in message.outputs],
        metrics=dict(message.metrics),
    )


def forward_backward_result(message: trainer_pb2.ForwardBackwardResponse) -> results.ForwardBackwardResult:
    return results.ForwardBackwardResult(
        logprobs=[tensors.decode(output.logprobs) for output in message.outputs],
        metrics=dict(message.metrics),
    )


def optim_step_result(message: trainer_pb2.OptimStepResponse) -> results.OptimStepResult:
    return results.OptimStepResult(step=message.step, grad_norm=message.grad_norm)


def sync_result(message: trainer_pb2.SyncAdapterResponse) -> results.SyncResult:
    return results.SyncResult(
        version=message.version,
        digest=message.digest,
        transport=_transport(message.transport),
        sent_bytes=message.sent_bytes,
        seconds=message.seconds,
        replicas=tuple(
            results.ReplicaPublication(
                address=replica.address,
                state=_REPLICA_STATES[replica.state],
                sent_bytes=replica.sent_bytes,
                seconds=replica.seconds,
                error=replica.error,
                difference=_difference(replica),
                transport=_transport(replica.transport),
                no_cuda_ipc=replica.no_cuda_ipc,
            )
            for replica in message.replicas
        ),
    )


def _transport(transport: trainer_pb2.Transport) -> str:
    return _short_name(trainer_pb2.Transport, transport, "TRANSPORT_") if transport else ""


def verify_result(message: trainer_pb2.VerifyAdapterResponse) -> results.VerifyResult:
    return results.VerifyResult(
        version=message.version,
        digest=message.digest,
        steps_since=message.steps_since,
        replicas=tuple(
            results.ReplicaVerification(replica.address, _difference(replica), replica.agrees, replica.error)
            for replica in message.replicas
        ),
    )


def _difference(
    replica: trainer_pb2.ReplicaPublication | trainer_pb2.ReplicaVerification,
) -> results.LogprobDifference | None:
    if not replica.HasField("difference"):
        return None
    return results.LogprobDifference(replica.difference.mean, replica.difference.max, replica.difference.tokens)


def optimizer_state(message: trainer_pb2.OptimizerState) -> results.OptimizerState:
    return results.OptimizerState(
        adapter_id=message.adapter_id,
        step=message.step,
        last_adam=_adam_params(message.last_adam) if message.HasField("last_adam") else None,
        accumulated_calls=message.accumulated_calls,
        size_bytes=message.size_bytes,
        tensors=tuple(
            results.TensorMoments(
                name=moments.name,
                shape=tuple(moments.shape),
                exp_avg_norm=moments.exp_avg_norm,
                exp_avg_sq_norm=moments.exp_avg_sq_norm,
            )
            for moments in message.tensors
        ),
    )


def checkpoint(message: trainer_pb2.Checkpoint) -> results.Checkpoint:
    return results.Checkpoint(
        checkpoint_id=message.checkpoint_id,
        adapter_id=message.adapter_id,
        lora=LoraConfig.from_proto(message.lora),
        step=message.step,
        seq_id=message.seq_id,
        created_at=_time(message.created_at),
        expires_at=_time(message.expires_at) if message.expires_at else None,
        size_bytes=message.size_bytes,
        path=message.path,
        base_model_fingerprint=message.base_model_fingerprint,
    )


def adapter_version(message: sampler_pb2.AdapterVersion) -> results.AdapterVersion:
    return results.AdapterVersion(
        adapter_id=message.adapter_id,
        version=message.version,
        digest=message.digest,
        base_model_fingerprint=message.base_model_fingerprint,
    )


def sampled_adapter(message: sampler_pb2.SampledAdapter) -> results.SampledAdapter:
    return results.SampledAdapter(
        adapter_id=message.adapter_id,
        latest_version=message.latest_version,
        versions=tuple(
            results.LiveVersion(
                version=live.version,
                digest=live.digest,
                lora=LoraConfig.from_proto(live.lora),
                size_bytes=live.size_bytes,
                active_requests=live.active_requests,
                leases=live.leases,
            )
            for live in message.versions
        ),
    )


def push_result(message: sampler_pb2.PushCommitted) -> results.PushResult:
    return results.PushResult(version=adapter_version(message.version), already_live=message.already_live)


def generate_delta(message: sampler_pb2.GenerateResponse) -> results.GenerateDelta:
    return results.GenerateDelta(
        index=message.index,
        tokens=tuple(message.tokens),
        text=message.text,
        logprobs=_positions(message.logprobs),
        finish_reason=_FINISH_REASONS[message.finish_reason],
        prompt_tokens=message.prompt_tokens,
        served_by=adapter_version(message.served_by),
        prompt_logprobs=_positions(message.prompt_logprobs),
    )


def _positions(messages: Iterable[sampler_pb2.PositionLogprobs]) -> tuple[results.PositionLogprobs, ...]:
    return tuple(
        results.PositionLogprobs(position.logprob, tuple((top.token, top.logprob) for top in position.top))
        for position in messages
    )


def generate_result(deltas: Sequence[results.GenerateDelta]) -> results.GenerateResult:
    """Puts the deltas of each completion together, in the order of their index."""
    by_index: dict[int, list[results.GenerateDelta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    if not by_index:
        raise InternalError("the sampler ended the call without a completion")
    any_delta = next(iter(by_index.values()))[0]
    return results.GenerateResult(
        completions=tuple(
            results.Completion(
                tokens=tuple(token for delta in parts for token in delta.tokens),
                text="".join(delta.text for delta in parts),
                logprobs=tuple(position for delta in parts for position in delta.logprobs),
                finish_reason=parts[-1].finish_reason,
            )
            for _, parts in sorted(by_index.items())
        ),
        prompt_tokens=any_delta.prompt_tokens,
        served_by=any_delta.served_by,
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs), ()),
    )


def batch_result(message: sampler_pb2.GenerateBatchResponse) -> results.GenerateResult:
    return results.GenerateResult(
        completions=tuple(
            results.Completion(
                tokens=tuple(completion.tokens),
                text=completion.text,
                logprobs=_positions(completion.logprobs),
                finish_reason=_FINISH_REASONS[completion.finish_reason],
            )
            for completion in message.completions
        ),
        prompt_tokens=message.prompt_tokens,
        served_by=adapter_version(message.served_by),
        prompt_logprobs=_positions(message.prompt_logprobs),
    )


def logprobs_result(message: sampler_pb2.ComputeLogprobsResponse) -> results.LogprobsResult:
    return results.LogprobsResult(
        logprobs=[tensors.decode(tensor) for tensor in message.logprobs],
        served_by=adapter_version(message.served_by),
    )


def _adam_params(message: trainer_pb2.AdamParams) -> AdamParams:
    return AdamParams(**{field.name: value for field, value in message.ListFields()})


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)  # noqa: UP017 - Python 3.10 lacks UTC


def _short_name(enum: Any, value: int, prefix: str) -> str:
    return enum.Name(value).removeprefix(prefix).lower()
