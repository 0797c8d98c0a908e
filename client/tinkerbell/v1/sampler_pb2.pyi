from tinkerbell.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class PushAdapterRequest(_message.Message):
    __slots__ = ("begin", "chunk", "commit", "prepare", "part")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    begin: PushBegin
    chunk: _common_pb2.PayloadChunk
    commit: PushCommit
    prepare: PushPrepare
    part: PushPart
    def __init__(self, begin: _Optional[_Union[PushBegin, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.PayloadChunk, _Mapping]] = ..., commit: _Optional[_Union[PushCommit, _Mapping]] = ..., prepare: _Optional[_Union[PushPrepare, _Mapping]] = ..., part: _Optional[_Union[PushPart, _Mapping]] = ...) -> None: ...

class PushBegin(_message.Message):
    __slots__ = ("adapter_id", "version", "manifest", "device_memory_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version: int
    manifest: _common_pb2.AdapterManifest
    device_memory_id: str
    def __init__(self, adapter_id: _Optional[str] = ..., version: _Optional[int] = ..., manifest: _Optional[_Union[_common_pb2.AdapterManifest, _Mapping]] = ..., device_memory_id: _Optional[str] = ...) -> None: ...

class OpenDeviceMemoryRequest(_message.Message):
    __slots__ = ("handle", "size_bytes", "host")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    handle: bytes
    size_bytes: int
    host: str
    def __init__(self, handle: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class OpenDeviceMemoryResponse(_message.Message):
    __slots__ = ("memory_id",)
    MEMORY_ID_FIELD_NUMBER: _ClassVar[int]
    memory_id: str
    def __init__(self, memory_id: _Optional[str] = ...) -> None: ...

class PushPart(_message.Message):
    __slots__ = ("offset", "size_bytes", "lane_port", "part_id")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANE_PORT_FIELD_NUMBER: _ClassVar[int]
    PART_ID_FIELD_NUMBER: _ClassVar[int]
    offset: int
    size_bytes: int
    lane_port: int
    part_id: int
    def __init__(self, offset: _Optional[int] = ..., size_bytes: _Optional[int] = ..., lane_port: _Optional[int] = ..., part_id: _Optional[int] = ...) -> None: ...

class TakePartsRequest(_message.Message):
    __slots__ = ("begin", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: PartBegin
    chunk: _common_pb2.PayloadChunk
    def __init__(self, begin: _Optional[_Union[PartBegin, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.PayloadChunk, _Mapping]] = ...) -> None: ...

class PartBegin(_message.Message):
    __slots__ = ("offset", "size_bytes")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    offset: int
    size_bytes: int
    def __init__(self, offset: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class TakePartsResponse(_message.Message):
    __slots__ = ("part_id",)
    PART_ID_FIELD_NUMBER: _ClassVar[int]
    part_id: int
    def __init__(self, part_id: _Optional[int] = ...) -> None: ...

class PushPrepare(_message.Message):
    __slots__ = ("probes",)
    PROBES_FIELD_NUMBER: _ClassVar[int]
    probes: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenSequence]
    def __init__(self, probes: _Optional[_Iterable[_Union[_common_pb2.TokenSequence, _Mapping]]] = ...) -> None: ...

class PushCommit(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PushAdapterResponse(_message.Message):
    __slots__ = ("accepted", "committed", "prepared")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    accepted: PushAccepted
    committed: PushCommitted
    prepared: PushPrepared
    def __init__(self, accepted: _Optional[_Union[PushAccepted, _Mapping]] = ..., committed: _Optional[_Union[PushCommitted, _Mapping]] = ..., prepared: _Optional[_Union[PushPrepared, _Mapping]] = ...) -> None: ...

class PushAccepted(_message.Message):
    __slots__ = ("lane_ports",)
    LANE_PORTS_FIELD_NUMBER: _ClassVar[int]
    lane_ports: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lane_ports: _Optional[_Iterable[int]] = ...) -> None: ...

class PushPrepared(_message.Message):
    __slots__ = ("logprobs",)
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.Tensor]
    def __init__(self, logprobs: _Optional[_Iterable[_Union[_common_pb2.Tensor, _Mapping]]] = ...) -> None: ...

class PushCommitted(_message.Message):
    __slots__ = ("version", "already_live")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ALREADY_LIVE_FIELD_NUMBER: _ClassVar[int]
    version: AdapterVersion
    already_live: bool
    def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., already_live: _Optional[bool] = ...) -> None: ...

class AdapterVersion(_message.Message):
    __slots__ = ("adapter_id", "version", "digest", "base_model_fingerprint")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version: int
    digest: str
    base_model_fingerprint: str
    def __init__(self, adapter_id: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., base_model_fingerprint: _Optional[str] = ...) -> None: ...

class ExportAdapterVersionRequest(_message.Message):
    __slots__ = ("adapter_id", "version")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version: int
    def __init__(self, adapter_id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class ExportAdapterVersionResponse(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: ExportedVersion
    chunk: _common_pb2.PayloadChunk
    def __init__(self, head: _Optional[_Union[ExportedVersion, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.PayloadChunk, _Mapping]] = ...) -> None: ...

class ExportedVersion(_message.Message):
    __slots__ = ("version", "manifest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    version: AdapterVersion
    manifest: _common_pb2.AdapterManifest
    def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., manifest: _Optional[_Union[_common_pb2.AdapterManifest, _Mapping]] = ...) -> None: ...

class LeaseVersionRequest(_message.Message):
    __slots__ = ("adapter_id", "version", "ttl_seconds", "lease_id")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version: int
    ttl_seconds: float
    lease_id: str
    def __init__(self, adapter_id: _Optional[str] = ..., version: _Optional[int] = ..., ttl_seconds: _Optional[float] = ..., lease_id: _Optional[str] = ...) -> None: ...

class LeaseVersionResponse(_message.Message):
    __slots__ = ("lease_id", "version")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    version: AdapterVersion
    def __init__(self, lease_id: _Optional[str] = ..., version: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class ReleaseLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class ReleaseLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConfirmCurrentRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConfirmCurrentResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[SampledAdapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[SampledAdapter, _Mapping]]] = ...) -> None: ...

class SampledAdapter(_message.Message):
    __slots__ = ("adapter_id", "latest_version", "versions")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    LATEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    latest_version: int
    versions: _containers.RepeatedCompositeFieldContainer[LiveVersion]
    def __init__(self, adapter_id: _Optional[str] = ..., latest_version: _Optional[int] = ..., versions: _Optional[_Iterable[_Union[LiveVersion, _Mapping]]] = ...) -> None: ...

class LiveVersion(_message.Message):
    __slots__ = ("version", "digest", "lora", "size_bytes", "active_requests", "leases")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    lora: _common_pb2.LoraConfig
    size_bytes: int
    active_requests: int
    leases: int
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., lora: _Optional[_Union[_common_pb2.LoraConfig, _Mapping]] = ..., size_bytes: _Optional[int] = ..., active_requests: _Optional[int] = ..., leases: _Optional[int] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "version")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version: int
    def __init__(self, adapter_id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, versions: _Optional[_Iterable[int]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs", "stop_token_ids", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "prompt_logprobs", "json_schema", "regex", "choice", "grammar")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    N_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    logprobs: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    prompt_logprobs: int
    json_schema: str
    regex: str
    choice: Choice
    grammar: str
    def __init__(self, n: _Optional[int] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., logprobs: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., prompt_logprobs: _Optional[int] = ..., json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., choice: _Optional[_Union[Choice, _Mapping]] = ..., grammar: _Optional[str] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, options: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("adapter_id", "version", "tokens", "text", "chat", "sampling")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version: int
    tokens: _common_pb2.TokenSequence
    text: str
    chat: Chat
    sampling: SamplingParams
    def __init__(self, adapter_id: _Optional[str] = ..., version: _Optional[int] = ..., tokens: _Optional[_Union[_common_pb2.TokenSequence, _Mapping]] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token", "logprob")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token: int
    logprob: float
    def __init__(self, token: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class PositionLogprobs(_message.Message):
    __slots__ = ("logprob", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("served_by", "index", "tokens", "text", "logprobs", "finish_reason", "prompt_tokens", "prompt_logprobs")
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    served_by: AdapterVersion
    index: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    finish_reason: FinishReason
    prompt_tokens: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    def __init__(self, served_by: _Optional[_Union[AdapterVersion, _Mapping]] = ..., index: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ...) -> None: ...

class GenerateBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[GenerateRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[GenerateRequest, _Mapping]]] = ...) -> None: ...

class GenerateBatchResponse(_message.Message):
    __slots__ = ("index", "served_by", "completions", "prompt_tokens", "prompt_logprobs")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    index: int
    served_by: AdapterVersion
    completions: _containers.RepeatedCompositeFieldContainer[Completion]
    prompt_tokens: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    def __init__(self, index: _Optional[int] = ..., served_by: _Optional[_Union[AdapterVersion, _Mapping]] = ..., completions: _Optional[_Iterable[_Union[Completion, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("tokens", "text", "logprobs", "finish_reason")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    finish_reason: FinishReason
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ...) -> None: ...

class ComputeLogprobsRequest(_message.Message):
    __slots__ = ("adapter_id", "version", "sequences")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version: int
    sequences: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenSequence]
    def __init__(self, adapter_id: _Optional[str] = ..., version: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[_common_pb2.TokenSequence, _Mapping]]] = ...) -> None: ...

class ComputeLogprobsResponse(_message.Message):
    __slots__ = ("served_by", "logprobs")
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    served_by: AdapterVersion
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.Tensor]
    def __init__(self, served_by: _Optional[_Union[AdapterVersion, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.Tensor, _Mapping]]] = ...) -> None: ...

class SamplerServiceGetBackendInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SamplerServiceGetBackendInfoResponse(_message.Message):
    __slots__ = ("base_model", "device", "versions", "max_rank", "max_loras", "keep_versions", "active_requests", "target_modules", "max_sequences", "active_sequences", "instance_id", "cuda_ipc_host")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_LORAS_FIELD_NUMBER: _ClassVar[int]
    KEEP_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_HOST_FIELD_NUMBER: _ClassVar[int]
    base_model: _common_pb2.BaseModelInfo
    device: str
    versions: _containers.ScalarMap[str, str]
    max_rank: int
    max_loras: int
    keep_versions: int
    active_requests: int
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    max_sequences: int
    active_sequences: int
    instance_id: str
    cuda_ipc_host: str
    def __init__(self, base_model: _Optional[_Union[_common_pb2.BaseModelInfo, _Mapping]] = ..., device: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., max_rank: _Optional[int] = ..., max_loras: _Optional[int] = ..., keep_versions: _Optional[int] = ..., active_requests: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ..., max_sequences: _Optional[int] = ..., active_sequences: _Optional[int] = ..., instance_id: _Optional[str] = ..., cuda_ipc_host: _Optional[str] = ...) -> None: ...
