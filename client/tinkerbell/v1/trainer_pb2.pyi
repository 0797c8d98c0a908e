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

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_GRPC: _ClassVar[Transport]
LOSS_FUNCTION_UNSPECIFIED: LossFunction
LOSS_FUNCTION_CROSS_ENTROPY: LossFunction
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_GRPC: Transport

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
    __slots__ = ("base_model", "device", "world_size", "versions", "num_adapters", "max_rank", "max_batch_tokens", "sampler_address", "target_modules")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    base_model: _common_pb2.BaseModelInfo
    device: str
    world_size: int
    versions: _containers.ScalarMap[str, str]
    num_adapters: int
    max_rank: int
    max_batch_tokens: int
    sampler_address: str
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, base_model: _Optional[_Union[_common_pb2.BaseModelInfo, _Mapping]] = ..., device: _Optional[str] = ..., world_size: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ..., num_adapters: _Optional[int] = ..., max_rank: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., sampler_address: _Optional[str] = ..., target_modules: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateLoraAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "lora", "seed")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    lora: _common_pb2.LoraConfig
    seed: int
    def __init__(self, adapter_id: _Optional[str] = ..., lora: _Optional[_Union[_common_pb2.LoraConfig, _Mapping]] = ..., seed: _Optional[int] = ...) -> None: ...

class CreateLoraAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: LoraAdapter
    def __init__(self, adapter: _Optional[_Union[LoraAdapter, _Mapping]] = ...) -> None: ...

class LoraAdapter(_message.Message):
    __slots__ = ("adapter_id", "lora", "seed", "num_parameters", "step", "published_version", "next_seq_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    lora: _common_pb2.LoraConfig
    seed: int
    num_parameters: int
    step: int
    published_version: int
    next_seq_id: int
    def __init__(self, adapter_id: _Optional[str] = ..., lora: _Optional[_Union[_common_pb2.LoraConfig, _Mapping]] = ..., seed: _Optional[int] = ..., num_parameters: _Optional[int] = ..., step: _Optional[int] = ..., published_version: _Optional[int] = ..., next_seq_id: _Optional[int] = ...) -> None: ...

class ListLoraAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLoraAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[LoraAdapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[LoraAdapter, _Mapping]]] = ...) -> None: ...

class RemoveLoraAdapterRequest(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    def __init__(self, adapter_id: _Optional[str] = ...) -> None: ...

class RemoveLoraAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

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
    __slots__ = ("adapter_id", "seq_id", "data", "loss")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    data: _containers.RepeatedCompositeFieldContainer[Datum]
    loss: LossFunction
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., data: _Optional[_Iterable[_Union[Datum, _Mapping]]] = ..., loss: _Optional[_Union[LossFunction, str]] = ...) -> None: ...

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
    __slots__ = ("adapter_id", "seq_id", "data", "loss")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    data: _containers.RepeatedCompositeFieldContainer[Datum]
    loss: LossFunction
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., data: _Optional[_Iterable[_Union[Datum, _Mapping]]] = ..., loss: _Optional[_Union[LossFunction, str]] = ...) -> None: ...

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
    __slots__ = ("adapter_id", "seq_id", "adam")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    adam: AdamParams
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., adam: _Optional[_Union[AdamParams, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("adapter_id", "seq_id", "transport")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    seq_id: int
    transport: Transport
    def __init__(self, adapter_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., transport: _Optional[_Union[Transport, str]] = ...) -> None: ...

class SyncAdapterResponse(_message.Message):
    __slots__ = ("version", "digest", "transport", "sent_bytes", "seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    transport: Transport
    sent_bytes: int
    seconds: float
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., transport: _Optional[_Union[Transport, str]] = ..., sent_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...
