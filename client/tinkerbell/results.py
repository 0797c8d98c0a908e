"""What the services answer, as plain dataclasses and numpy arrays.

Arrays that came over the wire are read-only; copy one to change it.
"""

import dataclasses
import datetime
from typing import Literal

import numpy as np

from tinkerbell.inputs import AdamParams
from tinkerbell.lora import LoraConfig

ReplicaState = Literal["committed", "already_live", "down"]
"""Whether a sampler has made a version live, had it already, or could not be reached."""
FinishReason = Literal["stop", "length"]
"""stop: an end-of-sequence token or a stop string. length: max_tokens, or the end of the model's context."""


@dataclasses.dataclass(frozen=True)
class BaseModelInfo:
    """The base model that a service holds."""

    name: str
    """As it was asked for: a folder or a hub name."""
    architecture: str
    """Hugging Face architecture, for example "LlamaForCausalLM"."""
    fingerprint: str
    """Hexadecimal sha256; trainer and sampler hold the same model exactly when it is equal."""
    vocab_size: int
    """Valid token ids are 0 to vocab_size - 1."""
    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    max_sequence_length: int
    """Longest sequence in tokens that the service accepts."""
    num_parameters: int
    """Parameters, tied ones counted once."""
    dtype: str
    """Element type of the base weights in the service, for example "bfloat16"."""


@dataclasses.dataclass(frozen=True)
class LoadProgress:
    """One step on the way to a loaded base model."""

    stage: str
    """What begins now: "resolving", "building", "loading", "verifying" or "ready"."""
    elapsed_seconds: float
    """Since the call began."""
    base_model: BaseModelInfo | None
    """The loaded model; only when ready."""


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """Numbers of ranks: world_size = tensor * pipeline * data."""

    world_size: int
    """Processes that hold the model together."""
    tensor: int
    """Ranks that share every layer."""
    pipeline: int
    """Stages, each with its own layers."""
    data: int
    """Copies of the model, each with its own part of a batch."""
    sequence_parallel: bool
    """Whether ranks that share a layer also share the tokens between its parts."""

    def __str__(self) -> str:
        sequence = ", sequence parallel" if self.sequence_parallel else ""
        return f"{self.world_size} = tensor {self.tensor} * pipeline {self.pipeline} * data {self.data}{sequence}"


@dataclasses.dataclass(frozen=True)
class TrainerInfo:
    """The trainer."""

    base_model: BaseModelInfo | None
    """None until a base model is loaded."""
    device: str
    """cpu or cuda."""
    parallelism: Parallelism
    """Processes that hold the model together, and how they share it."""
    versions: dict[str, str]
    """Versions of the parts that decide the numbers, by package name."""
    num_adapters: int
    """Adapters that exist."""
    num_resident_adapters: int
    """How many of them are in the device's memory at this moment."""
    max_adapters: int
    """Most adapters that can exist."""
    max_resident_adapters: int
    """Most that the device's memory holds; the least recently used of the others wait in host memory."""
    max_rank: int
    """Largest rank of an adapter."""
    max_batch_tokens: int
    """Most tokens in one forward or forward_backward."""
    sampler_addresses: tuple[str, ...]
    """Where adapters are published to; empty when nowhere."""
    target_modules: tuple[str, ...]
    """Linear layers that adapters of this base model can have."""


@dataclasses.dataclass(frozen=True)
class SamplerInfo:
    """The sampler."""

    base_model: BaseModelInfo
    """The base model."""
    device: str
    """cpu or cuda."""
    versions: dict[str, str]
    """Versions of the parts that decide the numbers, by package name."""
    max_rank: int
    """Largest rank of an adapter."""
    max_loras: int
    """Adapter versions that one engine step can mix."""
    keep_versions: int
    """Live versions kept per adapter besides those with running requests."""
    active_requests: int
    """Requests running or waiting in the engine."""
    target_modules: tuple[str, ...]
    """Linear layers that a pushed adapter can have."""
    max_sequences: int
    """Most sequences that may run or wait in the engine: completions, and sequences to score."""
    active_sequences: int
    """How many there are."""


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """An adapter of the trainer."""

    adapter_id: str
    """Its name."""
    lora: LoraConfig
    """Its shape."""
    seed: int
    """Seed of A's initial values."""
    num_parameters: int
    """Trainable parameters."""
    step: int
    """Optimizer steps applied."""
    published_version: int
    """Last published version of this name; 0 before the first."""
    next_seq_id: int
    """Number of the adapter's next operation."""
    resident: bool
    """Whether it is in the device's memory at this moment. One that is not comes back when it is used."""


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardResult:
    """Per-token logprobs and the loss."""

    logprobs: list[np.ndarray]
    """One per datum, in the order given: float32 [N], log p(target_tokens[i] | tokens[0..i]) at temperature 1."""
    metrics: dict[str, float]
    """"loss:sum" and "tokens:sum"; for cross_entropy "weights:sum" and, if that is not 0, "loss:mean" (their quotient);
    for losses with a ratio its "ratio:mean" over positions whose advantage is not 0, and for ppo and cispo the share
    "clipped:mean" of them whose ratio was clipped."""

    @property
    def loss(self) -> float:
        """For cross_entropy the weighted mean over tokens, "loss:mean"; for other losses the sum, "loss:sum"."""
        return self.metrics["loss:mean" if "loss:mean" in self.metrics else "loss:sum"]


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardBackwardResult(ForwardResult):
    """Per-token logprobs and the loss; the gradient stays in the trainer.

    "loss:sum" of `forward_backward_custom` is the loss that the function returned.
    """


@dataclasses.dataclass(frozen=True)
class OptimStepResult:
    """An optimizer step that was applied."""

    step: int
    """Steps applied to this adapter so far, this one included."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""


@dataclasses.dataclass(frozen=True)
class LogprobDifference:
    """How far apart the log-probabilities are that two models give to the same tokens."""

    mean: float
    """Of the absolute differences."""
    max: float
    """Largest absolute difference."""
    tokens: int
    """Tokens compared."""


@dataclasses.dataclass(frozen=True)
class ReplicaPublication:
    """What became of a version at one sampler."""

    address: str
    """HOST:PORT."""
    state: ReplicaState
    """Whether it made the version live, or had it. One that was down gets the version as soon as it is back."""
    sent_bytes: int
    """Payload bytes that were sent to it."""
    seconds: float
    """From BEGIN to its answer to COMMIT."""
    error: str
    """Why it does not have the version; empty if it has."""
    difference: LogprobDifference | None
    """How far it is from the trainer, if that was asked for."""
    transport: str
    """How the tensors travelled to it: "cuda_ipc", "grpc", or "" if they did not have to."""
    no_cuda_ipc: str
    """Why they did not travel by CUDA IPC, if the trainer has it switched on."""


@dataclasses.dataclass(frozen=True)
class ReplicaVerification:
    """One sampler compared with the trainer."""

    address: str
    """HOST:PORT."""
    difference: LogprobDifference | None
    """The distance; None when there is an error."""
    agrees: bool
    """Whether it is within the tolerance."""
    error: str
    """Why it could not be compared; empty if it could."""


@dataclasses.dataclass(frozen=True)
class VerifyResult:
    """All samplers compared with the trainer."""

    version: int
    """The latest published version, which was compared."""
    digest: str
    """Its digest."""
    steps_since: int
    """Optimizer steps since it was published, which are a good reason to differ."""
    replicas: tuple[ReplicaVerification, ...]
    """One per sampler, in order of address."""


@dataclasses.dataclass(frozen=True)
class SyncResult:
    """A published version."""

    version: int
    """The version that requests can name from now on; "latest" means this one."""
    digest: str
    """Its digest."""
    transport: str
    """How the tensors travelled: "cuda_ipc", "grpc", or "" if none had to. Where samplers differ, the slower way."""
    sent_bytes: int
    """Payload bytes that were sent, to all samplers together; 0 when all had the version already."""
    seconds: float
    """From snapshot to the last commit."""
    replicas: tuple[ReplicaPublication, ...]
    """One per sampler, in order of address."""


@dataclasses.dataclass(frozen=True)
class TensorMoments:
    """The Adam moments of one tensor, summed up."""

    name: str
    """PEFT name."""
    shape: tuple[int, ...]
    """Two dimensions."""
    exp_avg_norm: float
    """L2 norm of the first moment."""
    exp_avg_sq_norm: float
    """L2 norm of the second moment."""


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """The state of one adapter's AdamW."""

    adapter_id: str
    """Which adapter."""
    step: int
    """Steps applied."""
    last_adam: AdamParams | None
    """Hyper-parameters of the last step; None before the first."""
    accumulated_calls: int
    """forward_backward calls in the accumulated gradient."""
    size_bytes: int
    """Weights, gradients and moments together."""
    tensors: tuple[TensorMoments, ...]
    """One per tensor; empty in a list of all optimizers."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedOptimizer:
    """One adapter's AdamW with its moments."""

    state: OptimizerState
    """What they belong to."""
    exp_avg: dict[str, np.ndarray]
    """First moments by the PEFT names of the weights; float32, read-only."""
    exp_avg_sq: dict[str, np.ndarray]
    """Second moments, likewise."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An adapter with its optimizer, on the trainer's disk."""

    checkpoint_id: str
    """ADAPTER/NAME."""
    adapter_id: str
    """The adapter that was saved."""
    lora: LoraConfig
    """Its shape."""
    step: int
    """Optimizer steps in it."""
    seq_id: int
    """The last operation in it, by number."""
    created_at: datetime.datetime
    """When it was saved, UTC."""
    expires_at: datetime.datetime | None
    """When it may be deleted, likewise; None for never."""
    size_bytes: int
    """Bytes on disk."""
    path: str
    """The folder on the trainer's host, which peft's from_pretrained reads as it is."""
    base_model_fingerprint: str
    """Fingerprint of the base model that it belongs to."""


@dataclasses.dataclass(frozen=True)
class AdapterVersion:
    """One immutable version of an adapter."""

    adapter_id: str
    """The adapter; empty for the bare base model."""
    version: int
    """Its version; 0 for the bare base model."""
    digest: str
    """The version's digest; for the bare base model, its fingerprint."""
    base_model_fingerprint: str
    """The base model's fingerprint."""


@dataclasses.dataclass(frozen=True)
class LiveVersion:
    """A version that can be sampled."""

    version: int
    """Its number."""
    digest: str
    """Its digest."""
    lora: LoraConfig
    """Its shape."""
    size_bytes: int
    """Bytes of its payload."""
    active_requests: int
    """Requests running on it."""
    leases: int
    """Leases on it."""


@dataclasses.dataclass(frozen=True)
class Lease:
    """A version that a sampler keeps for a while."""

    lease_id: str
    """Names the lease."""
    version: AdapterVersion
    """What is kept."""


@dataclasses.dataclass(frozen=True)
class SampledAdapter:
    """An adapter that can be sampled."""

    adapter_id: str
    """Its name."""
    latest_version: int
    """What a request without a version gets."""
    versions: tuple[LiveVersion, ...]
    """Its live versions in ascending order."""


@dataclasses.dataclass(frozen=True)
class PushResult:
    """A version that is live on the sampler."""

    version: AdapterVersion
    """What is live."""
    already_live: bool
    """True when this digest was live before the push, and no payload was sent."""


@dataclasses.dataclass(frozen=True)
class PositionLogprobs:
    """Logprobs at one position, of the model's own distribution: before temperature, top_p and all else."""

    logprob: float
    """The token's that was sampled, or that the prompt has."""
    top: tuple[tuple[int, float], ...]
    """(token, logprob) of the likeliest tokens, in descending order."""


@dataclasses.dataclass(frozen=True)
class GenerateDelta:
    """New tokens of one completion."""

    index: int
    """Which completion, from 0 to n - 1."""
    tokens: tuple[int, ...]
    """The new token ids."""
    text: str
    """The new text."""
    logprobs: tuple[PositionLogprobs, ...]
    """One per new token, if logprobs were asked for; else empty."""
    finish_reason: FinishReason | None
    """Set on the completion's last delta."""
    prompt_tokens: int
    """Tokens in the prompt."""
    served_by: AdapterVersion
    """What produced them."""
    prompt_logprobs: tuple[PositionLogprobs, ...]
    """In the first delta, if asked for: one per token of the prompt after the first."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation of a prompt, T tokens long."""

    tokens: tuple[int, ...]
    """T token ids."""
    text: str
    """Their text, without the stop string."""
    logprobs: tuple[PositionLogprobs, ...]
    """T entries if logprobs were asked for; else empty."""
    finish_reason: FinishReason | None
    """Why it ended."""


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """All completions of one prompt."""

    completions: tuple[Completion, ...]
    """n of them."""
    prompt_tokens: int
    """Tokens in the prompt."""
    served_by: AdapterVersion
    """The one version that produced all of them."""
    prompt_logprobs: tuple[PositionLogprobs, ...]
    """One per token of the prompt after the first, if asked for; else empty."""

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text


@dataclasses.dataclass(frozen=True, eq=False)
class LogprobsResult:
    """Scores of given tokens."""

    logprobs: list[np.ndarray]
    """One per sequence: float32 [N - 1], log p(tokens[i + 1] | tokens[0..i]) at temperature 1."""
    served_by: AdapterVersion
    """What produced them."""
