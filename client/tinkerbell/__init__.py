"""Tinkerbell's client: fine-tune LoRA adapters on a shared base model and sample from them a moment later.

    from tinkerbell import Datum, SamplerClient, TrainerClient

    trainer, sampler = TrainerClient("localhost:50051"), SamplerClient("localhost:50052")
    run = trainer.create_lora_adapter("alice", rank=16)
    run.forward_backward([Datum.from_prompt_and_completion(prompt_tokens, completion_tokens)])
    run.optim_step(learning_rate=3e-4)
    run.sync_adapter_to_vllm().result()
    print(sampler.generate("Once upon a time", adapter_id="alice").result().text)

One rule for both clients: work that keeps an engine busy returns a future, everything else its answer. The Async*
classes are the same for asyncio. `tinkerbell.errors` says what a call can raise.
"""

from tinkerbell._retry import Retry
from tinkerbell.aio import AsyncSamplerClient, AsyncTrainerClient, AsyncTrainingRun
from tinkerbell.custom_loss import torch_loss
from tinkerbell.errors import (
    AbortedError,
    AlreadyExistsError,
    CallCancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    TinkerbellError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from tinkerbell.inputs import AdamParams, Datum, LossConfig, SamplingParams, Verification
from tinkerbell.lora import LoraConfig
from tinkerbell.results import (
    AdapterVersion,
    BaseModelInfo,
    Checkpoint,
    Completion,
    ExportedOptimizer,
    ForwardBackwardResult,
    ForwardResult,
    GenerateDelta,
    GenerateResult,
    Lease,
    LiveVersion,
    LoadProgress,
    LogprobDifference,
    LogprobsResult,
    LoraAdapter,
    OptimizerState,
    OptimStepResult,
    Parallelism,
    PositionLogprobs,
    PushResult,
    ReplicaPublication,
    ReplicaVerification,
    SampledAdapter,
    SamplerInfo,
    SyncResult,
    TensorMoments,
    TrainerInfo,
    VerifyResult,
)
from tinkerbell.sync import SamplerClient, TrainerClient, TrainingRun

__all__ = [
    "AbortedError",
    "AdamParams",
    "AdapterVersion",
    "AlreadyExistsError",
    "AsyncSamplerClient",
    "AsyncTrainerClient",
    "AsyncTrainingRun",
    "BaseModelInfo",
    "CallCancelledError",
    "Checkpoint",
    "Completion",
    "DataLossError",
    "Datum",
    "DeadlineExceededError",
    "ExportedOptimizer",
    "FailedPreconditionError",
    "ForwardBackwardResult",
    "ForwardResult",
    "GenerateDelta",
    "GenerateResult",
    "InternalError",
    "InvalidArgumentError",
    "Lease",
    "LiveVersion",
    "LoadProgress",
    "LogprobDifference",
    "LogprobsResult",
    "LoraAdapter",
    "LoraConfig",
    "LossConfig",
    "NotFoundError",
    "OptimStepResult",
    "OptimizerState",
    "Parallelism",
    "PermissionDeniedError",
    "PositionLogprobs",
    "PushResult",
    "ReplicaPublication",
    "ReplicaVerification",
    "ResourceExhaustedError",
    "Retry",
    "SampledAdapter",
    "SamplerClient",
    "SamplerInfo",
    "SamplingParams",
    "SyncResult",
    "TensorMoments",
    "TinkerbellError",
    "TrainerClient",
    "TrainerInfo",
    "TrainingRun",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Verification",
    "VerifyResult",
    "torch_loss",
]
