from tinkerbell.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LossFunction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_FUNCTION_UNSPECIFIED: _ClassVar[LossFunction]
    LOSS_FUNCTION_CROSS_ENTROPY: _ClassVar[LossFunction]
    LOSS_FUNCTION_IMPORTANCE_SAMPLING: _ClassVar[LossFunction]
    LOSS_FUNCTION_PPO: _ClassVar[LossFunction]
    LOSS_FUNCTION_CISPO: _ClassVar[LossFunction]
    LOSS_FUNCTION_DRO: _ClassVar[LossFunction]
    LOSS_FUNCTION_CUSTOM: _ClassVar[LossFunction]

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_GRPC: _ClassVar[Transport]
    TRANSPORT_CUDA_IPC: _ClassVar[Transport]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_COMMITTED: _ClassVar[ReplicaState]
    REPLICA_STATE_ALREADY_LIVE: _ClassVar[ReplicaState]
    REPLICA_STATE_DOWN: _ClassVar[ReplicaState]
LOSS_FUNCTION_UNSPECIFIED: LossFunction
LOSS_FUNCTION_CROSS_ENTROPY: LossFunction
LOSS_FUNCTION_IMPORTANCE_SAMPLING: LossFunction
LOSS_FUNCTION_PPO: LossFunction
LOSS_FUNCTION_CISPO: LossFunction
LOSS_FUNCTION_DRO: LossFunction
LOSS_FUNCTION_CUSTOM: LossFunction
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_GRPC: Transport
TRANSPORT_CUDA_IPC: Transport
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_COMMITTED: ReplicaState
REPLICA_STATE_ALREADY_LIVE: ReplicaState
REPLICA_STATE_DOWN: ReplicaState

class InitializeBaseModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class InitializeBaseModelResponse(_message.Message):
    __slots__ = ("stage", "elapsed_seconds", "base_model")
    class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STAGE_UNSPECIFIED: _ClassVar[InitializeBaseModelResponse.Stage]
        STAGE_RESOLVING: _ClassVar[InitializeBaseModelResponse.Stage]
        STAGE_BUILDING: _ClassVar[InitializeBaseModelResponse.Stage]
        STAGE_LOADING: _ClassVar[InitializeBaseModelResponse.Stage]
        STAGE_VERIFYING: _ClassVar[InitializeBaseModelResponse.Stage]
        STAGE_READY: _ClassVar[InitializeBaseModelResponse.Stage]
    STAGE_UNSPECIFIED: InitializeBaseModelResponse.Stage
    STAGE_RESOLVING: InitializeBaseModelResponse.Stage
    STAGE_BUILDING: InitializeBaseModelResponse.Stage
    STAGE_LOADING: InitializeBaseModelResponse.Stage
    STAGE_VERIFYING: InitializeBaseModelResponse.Stage
    STAGE_READY: InitializeBaseModelResponse.Stage
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    stage: InitializeBaseModelResponse.Stage
    elapsed_seconds: float
    base_model: _common_pb2.BaseModelInfo
    def __init__(self, stage: _Optional[_Union[InitializeBaseModelResponse.Stage, str]] = ..., elapsed_seconds: _Optional[float] = ..., base_model: _Optional[_Union[_common_pb2.BaseModelInfo, _Mapping]] = ...) -> None: ...

class TrainerServiceGetBackendInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrainerServiceGetBackendInfoResponse(_message.Message):
    __slots__ = ("base_model", "device", "parallelism", "versions", "num_adapters", "num_resident_adapters", "max_adapters", "max_resident_adapters", "max_rank", "max_batch_tokens", "sampler_addresses", "target_modules")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PARALLELISM_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESIDENT_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_RESIDENT_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    base_model: _common_pb2.BaseModelInfo
    device: str
    parallelism: Parallelism
    versions: _containers.ScalarMap[str, str]
    num_adapters: int
    num_resident_adapters: int
    max_adapters: int
    max_resident_adapters: int
    max_rank: int
    max_batch_tokens: int
    sampler_addresses: _containers.RepeatedScalarFieldContainer[str]
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, base_model: _Optional[_Union[_common_pb2.BaseModelInfo, _Mapping]] = ..., device: _Optional[str] = ..., parallelism: _Optional[_Union[Parallelism, _Mapping]] = ..., versions: _Optional[_Mapping[str, str]] = ..., num_adapters: _Optional[int] = ..., num_resident_adapters: _Optional[int] = ..., max_adapters: _Optional[int] = ..., max_resident_adapters: _Optional[int] = ..., max_rank: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., sampler_addresses: _Optional[_Iterable[str]] = ..., target_modules: _Optional[_Iterable[str]] = ...) -> None: ...

class Parallelism(_message.Message):
    __slots__ = ("world_size", "tensor", "pipeline", "data", "sequence_parallel")
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    world_size: int
    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    def __init__(self, world_size: _Optional[int] = ..., tensor: _Optional[int] = ..., pipeline: _Optional[int] = ..., data: _Optional[int] = ..., sequence_parallel: _Optional[bool] = ...) -> None: ...

class CreateLoraAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "lora", "seed", "request_id", "from_checkpoint", "fresh_optimizer")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FRESH_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    lora: _common_pb2.LoraConfig
    seed: int
    request_id: str
    from_checkpoint: str
    fresh_optimizer: bool
    def __init__(self, adapter_id: _Optional[str] = ..., lora: _Optional[_Union[_common_pb2.LoraConfig, _Mapping]] = ..., seed: _Optional[int] = ..., request_id: _Optional[str] = ..., from_checkpoint: _Optional[str] = ..., fresh_optimizer: _Optional[bool] = ...) -> None: ...

class CreateLoraAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: LoraAdapter
    def __init__(self, adapter: _Optional[_Union[LoraAdapter, _Mapping]] = ...) -> None: ...

class LoraAdapter(_message.Message):
    __slots__ = ("adapter_id", "lora", "seed", "num_parameters", "step", "published_version", "next_seq_id", "resident")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    lora: _common_pb2.LoraConfig
    seed: int
    num_parameters: int
    step: int
    published_version: int
    next_seq_id: int
    resident: bool
    def __init__(self, adapter_id: _Optional[str] = ..., lora: _Optional[_Union[_common_pb2.LoraConfig, _Mapping]] = ..., seed: _Optional[int] = ..., num_parameters: _Optional[int] = ..., step: _Optional[int] = ..., published_version: _Optional[int] = ..., next_seq_id: _Optional[int] = ..., resident: _Optional[bool] = ...) -> None: ...

class ListLoraAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLoraAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[LoraAdapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[LoraAdapter, _Mapping]]] = ...) -> None: ...

class RemoveLoraAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "request_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    request_id: str
    def __init__(self, adapter_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class RemoveLoraAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ImportAdapterWeightsRequest(_message.Message):
    __slots__ = ("begin", "chunk", "commit")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    begin: ImportBegin
    chunk: _common_pb2.PayloadChunk
    commit: ImportCommit
    def __init__(self, begin: _Optional[_Union[ImportBegin, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.PayloadChunk, _Mapping]] = ..., commit: _Optional[_Union[ImportCommit, _Mapping]] = ...) -> None: ...

class ImportBegin(_message.Message):
    __slots__ = ("adapter_id", "seq_id", "request_id", "manifest")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    request_id: str
    manifest: _common_pb2.AdapterManifest
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., request_id: _Optional[str] = ..., manifest: _Optional[_Union[_common_pb2.AdapterManifest, _Mapping]] = ...) -> None: ...

class ImportCommit(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ImportAdapterWeightsResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: LoraAdapter
    def __init__(self, adapter: _Optional[_Union[LoraAdapter, _Mapping]] = ...) -> None: ...

class LossConfig(_message.Message):
    __slots__ = ("clip_low_threshold", "clip_high_threshold", "beta")
    CLIP_LOW_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CLIP_HIGH_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    clip_low_threshold: float
    clip_high_threshold: float
    beta: float
    def __init__(self, clip_low_threshold: _Optional[float] = ..., clip_high_threshold: _Optional[float] = ..., beta: _Optional[float] = ...) -> None: ...

class Datum(_message.Message):
    __slots__ = ("tokens", "loss_inputs")
    class LossInputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _common_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_INPUTS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    loss_inputs: _containers.MessageMap[str, _common_pb2.Tensor]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., loss_inputs: _Optional[_Mapping[str, _common_pb2.Tensor]] = ...) -> None: ...

class DatumOutput(_message.Message):
    __slots__ = ("logprobs",)
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: _common_pb2.Tensor
    def __init__(self, logprobs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("adapter_id", "seq_id", "data", "loss", "loss_config", "request_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_CONFIG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    data: _containers.RepeatedCompositeFieldContainer[Datum]
    loss: LossFunction
    loss_config: LossConfig
    request_id: str
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., data: _Optional[_Iterable[_Union[Datum, _Mapping]]] = ..., loss: _Optional[_Union[LossFunction, str]] = ..., loss_config: _Optional[_Union[LossConfig, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("outputs", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[DatumOutput]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, outputs: _Optional[_Iterable[_Union[DatumOutput, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ForwardBackwardRequest(_message.Message):
    __slots__ = ("adapter_id", "seq_id", "data", "loss", "loss_config", "request_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_CONFIG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    data: _containers.RepeatedCompositeFieldContainer[Datum]
    loss: LossFunction
    loss_config: LossConfig
    request_id: str
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., data: _Optional[_Iterable[_Union[Datum, _Mapping]]] = ..., loss: _Optional[_Union[LossFunction, str]] = ..., loss_config: _Optional[_Union[LossConfig, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class ForwardBackwardResponse(_message.Message):
    __slots__ = ("outputs", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[DatumOutput]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, outputs: _Optional[_Iterable[_Union[DatumOutput, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class AdamParams(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., grad_clip_norm: _Optional[float] = ...) -> None: ...

class OptimStepRequest(_message.Message):
    __slots__ = ("adapter_id", "seq_id", "adam", "request_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    adam: AdamParams
    request_id: str
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., adam: _Optional[_Union[AdamParams, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class OptimStepResponse(_message.Message):
    __slots__ = ("step", "grad_norm")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    step: int
    grad_norm: float
    def __init__(self, step: _Optional[int] = ..., grad_norm: _Optional[float] = ...) -> None: ...

class GetOptimizerStateRequest(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    def __init__(self, adapter_id: _Optional[str] = ...) -> None: ...

class GetOptimizerStateResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: OptimizerState
    def __init__(self, state: _Optional[_Union[OptimizerState, _Mapping]] = ...) -> None: ...

class OptimizerState(_message.Message):
    __slots__ = ("adapter_id", "step", "last_adam", "accumulated_calls", "size_bytes", "tensors")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_ADAM_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_CALLS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    step: int
    last_adam: AdamParams
    accumulated_calls: int
    size_bytes: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorMoments]
    def __init__(self, adapter_id: _Optional[str] = ..., step: _Optional[int] = ..., last_adam: _Optional[_Union[AdamParams, _Mapping]] = ..., accumulated_calls: _Optional[int] = ..., size_bytes: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorMoments, _Mapping]]] = ...) -> None: ...

class TensorMoments(_message.Message):
    __slots__ = ("name", "shape", "exp_avg_norm", "exp_avg_sq_norm")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    EXP_AVG_NORM_FIELD_NUMBER: _ClassVar[int]
    EXP_AVG_SQ_NORM_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    exp_avg_norm: float
    exp_avg_sq_norm: float
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., exp_avg_norm: _Optional[float] = ..., exp_avg_sq_norm: _Optional[float] = ...) -> None: ...

class ListOptimizerStatesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListOptimizerStatesResponse(_message.Message):
    __slots__ = ("states",)
    STATES_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedCompositeFieldContainer[OptimizerState]
    def __init__(self, states: _Optional[_Iterable[_Union[OptimizerState, _Mapping]]] = ...) -> None: ...

class ExportOptimizerStateRequest(_message.Message):
    __slots__ = ("adapter_id", "seq_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ...) -> None: ...

class ExportOptimizerStateResponse(_message.Message):
    __slots__ = ("state", "first_moment", "second_moment", "chunk")
    STATE_FIELD_NUMBER: _ClassVar[int]
    FIRST_MOMENT_FIELD_NUMBER: _ClassVar[int]
    SECOND_MOMENT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    state: OptimizerState
    first_moment: _common_pb2.AdapterManifest
    second_moment: _common_pb2.AdapterManifest
    chunk: _common_pb2.PayloadChunk
    def __init__(self, state: _Optional[_Union[OptimizerState, _Mapping]] = ..., first_moment: _Optional[_Union[_common_pb2.AdapterManifest, _Mapping]] = ..., second_moment: _Optional[_Union[_common_pb2.AdapterManifest, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.PayloadChunk, _Mapping]] = ...) -> None: ...

class ExportAdapterWeightsRequest(_message.Message):
    __slots__ = ("adapter_id", "seq_id", "dtype")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    dtype: _common_pb2.DataType
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., dtype: _Optional[_Union[_common_pb2.DataType, str]] = ...) -> None: ...

class ExportAdapterWeightsResponse(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: _common_pb2.AdapterManifest
    chunk: _common_pb2.PayloadChunk
    def __init__(self, manifest: _Optional[_Union[_common_pb2.AdapterManifest, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.PayloadChunk, _Mapping]] = ...) -> None: ...

class SyncAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "seq_id", "transport", "request_id", "verify")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    transport: Transport
    request_id: str
    verify: Verification
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., transport: _Optional[_Union[Transport, str]] = ..., request_id: _Optional[str] = ..., verify: _Optional[_Union[Verification, _Mapping]] = ...) -> None: ...

class Verification(_message.Message):
    __slots__ = ("sequences", "tolerance")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenSequence]
    tolerance: float
    def __init__(self, sequences: _Optional[_Iterable[_Union[_common_pb2.TokenSequence, _Mapping]]] = ..., tolerance: _Optional[float] = ...) -> None: ...

class SyncAdapterResponse(_message.Message):
    __slots__ = ("version", "digest", "transport", "sent_bytes", "seconds", "replicas")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    transport: Transport
    sent_bytes: int
    seconds: float
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaPublication]
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., transport: _Optional[_Union[Transport, str]] = ..., sent_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., replicas: _Optional[_Iterable[_Union[ReplicaPublication, _Mapping]]] = ...) -> None: ...

class ReplicaPublication(_message.Message):
    __slots__ = ("address", "state", "sent_bytes", "seconds", "error", "difference", "transport", "no_cuda_ipc")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NO_CUDA_IPC_FIELD_NUMBER: _ClassVar[int]
    address: str
    state: ReplicaState
    sent_bytes: int
    seconds: float
    error: str
    difference: LogprobDifference
    transport: Transport
    no_cuda_ipc: str
    def __init__(self, address: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., sent_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., error: _Optional[str] = ..., difference: _Optional[_Union[LogprobDifference, _Mapping]] = ..., transport: _Optional[_Union[Transport, str]] = ..., no_cuda_ipc: _Optional[str] = ...) -> None: ...

class LogprobDifference(_message.Message):
    __slots__ = ("mean", "max", "tokens")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    mean: float
    max: float
    tokens: int
    def __init__(self, mean: _Optional[float] = ..., max: _Optional[float] = ..., tokens: _Optional[int] = ...) -> None: ...

class VerifyAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "verify")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    verify: Verification
    def __init__(self, adapter_id: _Optional[str] = ..., verify: _Optional[_Union[Verification, _Mapping]] = ...) -> None: ...

class VerifyAdapterResponse(_message.Message):
    __slots__ = ("version", "digest", "steps_since", "replicas")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STEPS_SINCE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    steps_since: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaVerification]
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., steps_since: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaVerification, _Mapping]]] = ...) -> None: ...

class ReplicaVerification(_message.Message):
    __slots__ = ("address", "difference", "agrees", "error")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    AGREES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    address: str
    difference: LogprobDifference
    agrees: bool
    error: str
    def __init__(self, address: _Optional[str] = ..., difference: _Optional[_Union[LogprobDifference, _Mapping]] = ..., agrees: _Optional[bool] = ..., error: _Optional[str] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("checkpoint_id", "adapter_id", "lora", "step", "seq_id", "created_at", "expires_at", "size_bytes", "path", "base_model_fingerprint")
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    adapter_id: str
    lora: _common_pb2.LoraConfig
    step: int
    seq_id: int
    created_at: float
    expires_at: float
    size_bytes: int
    path: str
    base_model_fingerprint: str
    def __init__(self, checkpoint_id: _Optional[str] = ..., adapter_id: _Optional[str] = ..., lora: _Optional[_Union[_common_pb2.LoraConfig, _Mapping]] = ..., step: _Optional[int] = ..., seq_id: _Optional[int] = ..., created_at: _Optional[float] = ..., expires_at: _Optional[float] = ..., size_bytes: _Optional[int] = ..., path: _Optional[str] = ..., base_model_fingerprint: _Optional[str] = ...) -> None: ...

class SaveCheckpointRequest(_message.Message):
    __slots__ = ("adapter_id", "seq_id", "request_id", "name", "ttl_seconds")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    request_id: str
    name: str
    ttl_seconds: float
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., request_id: _Optional[str] = ..., name: _Optional[str] = ..., ttl_seconds: _Optional[float] = ...) -> None: ...

class SaveCheckpointResponse(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: Checkpoint
    def __init__(self, checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class LoadCheckpointRequest(_message.Message):
    __slots__ = ("adapter_id", "seq_id", "request_id", "checkpoint_id", "fresh_optimizer")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    FRESH_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    request_id: str
    checkpoint_id: str
    fresh_optimizer: bool
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., request_id: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., fresh_optimizer: _Optional[bool] = ...) -> None: ...

class LoadCheckpointResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: LoraAdapter
    def __init__(self, adapter: _Optional[_Union[LoraAdapter, _Mapping]] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    def __init__(self, adapter_id: _Optional[str] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ...) -> None: ...

class DeleteCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint_id", "request_id")
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    request_id: str
    def __init__(self, checkpoint_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class DeleteCheckpointResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
