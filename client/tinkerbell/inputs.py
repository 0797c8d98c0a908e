"""What a caller hands to the services: training data, losses, hyper-parameters, prompts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from tinkerbell import tensors
from tinkerbell.v1 import sampler_pb2, trainer_pb2

Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, str]]
"""Text; token ids; or chat messages, each {"role": "system" | "user" | "assistant", "content": text}."""

Transport = Literal["auto", "cuda_ipc", "grpc"]
"""How an adapter's tensors travel from the trainer to the samplers; "auto" is the fastest way to each of them."""

_TRANSPORTS: dict[str, trainer_pb2.Transport] = {
    "auto": trainer_pb2.TRANSPORT_UNSPECIFIED,
    "cuda_ipc": trainer_pb2.TRANSPORT_CUDA_IPC,
    "grpc": trainer_pb2.TRANSPORT_GRPC,
}

Loss = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "custom"]
"""A loss over per-token logprobs, as Tinker defines it (https://tinker-docs.thinkingmachines.ai/losses): a sum over
tokens, so that gradients of two calls add up to the gradient of one call with both batches. With lp the logprob of a
target token, q its logprob when it was sampled, ratio = exp(lp - q), and clip(ratio) between the two thresholds:

| loss                  | each token's term                                               | inputs of a Datum    |
|-----------------------|-----------------------------------------------------------------|----------------------|
| `cross_entropy`       | -weights * lp                                                   | weights, if any      |
| `importance_sampling` | -ratio * advantages                                             | logprobs, advantages |
| `ppo`                 | -min(ratio * advantages, clip(ratio) * advantages)              | logprobs, advantages |
| `cispo`               | -clip(ratio) * lp * advantages, clip(ratio) taken as a constant | logprobs, advantages |
| `dro`                 | -(lp * advantages - beta / 2 * (lp - q)^2)                      | logprobs, advantages |
| `custom`              | logprob_gradients * lp, the former taken as constants           | logprob_gradients    |

Only the inputs that a loss takes travel with it.
"""


@dataclasses.dataclass(frozen=True)
class Verification:
    """How to compare a sampler with the trainer: by the log-probabilities that both give to the same tokens."""

    sequences: Sequence[ArrayLike] = ()
    """The probe: token ids, at least two each. Empty means 4 sequences of 16 ids that the trainer chooses."""
    tolerance: float | None = None
    """Largest mean absolute difference that counts as agreement. None means 0.01 where the sampler's weights are
    float32 and 0.4 where they have 16 bits, which is what rounding explains on random tokens; likely ones, such as
    samples of the adapter, come closer."""

    def to_proto(self) -> trainer_pb2.Verification:
        """The message. ValueError when a sequence is not one of token ids."""
        message = trainer_pb2.Verification(tolerance=self.tolerance)
        for number, sequence in enumerate(self.sequences):
            message.sequences.add(tokens=token_array(sequence, f"sequence {number}", np.int32).tolist())
        return message


_RATIO_INPUTS = ("logprobs", "advantages")
_REQUIRED_INPUTS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "importance_sampling": _RATIO_INPUTS,
    "ppo": _RATIO_INPUTS,
    "cispo": _RATIO_INPUTS,
    "dro": _RATIO_INPUTS,
    "custom": ("logprob_gradients",),
}
_OPTIONAL_INPUTS: dict[str, tuple[str, ...]] = {"cross_entropy": ("weights",)}
_FLOAT_INPUTS = ("weights", "logprobs", "advantages", "logprob_gradients")


@dataclasses.dataclass(frozen=True, eq=False)
class Datum:
    """One training sequence of N >= 1 tokens.

    At position i the model reads tokens[0..i] and is asked for target_tokens[i]. Lists and arrays are both welcome;
    the fields are arrays. `Loss` says which of the others a loss takes. ValueError when the lengths differ or a token
    id is not an integer.
    """

    tokens: ArrayLike
    """Input token ids; int32 [N]."""
    target_tokens: ArrayLike
    """The token to predict at each position; int64 [N]."""
    weights: ArrayLike | None = None
    """Factor of each position's loss; float32 [N]. None means all ones."""
    logprobs: ArrayLike | None = None
    """Log-probabilities under which the targets were sampled; float32 [N]."""
    advantages: ArrayLike | None = None
    """How much better than expected each target was; float32 [N]. 0 leaves a position out."""
    logprob_gradients: ArrayLike | None = None
    """Derivative of your own loss with respect to each logprob; float32 [N]."""

    def __post_init__(self):
        tokens = token_array(self.tokens, "tokens", np.int32)
        targets = token_array(self.target_tokens, "target_tokens", np.int64)
        if len(tokens) == 0:
            raise ValueError("a datum needs at least one token")
        if len(targets) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens and {len(targets)} target_tokens: the lengths must be equal")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "target_tokens", targets)
        for name in _FLOAT_INPUTS:
            if getattr(self, name) is not None:
                values = np.asarray(getattr(self, name), dtype=np.float32)
                if values.shape != tokens.shape:
                    raise ValueError(
                        f"{len(tokens)} tokens and {name} of shape {values.shape}: give one number a token"
                    )
                object.__setattr__(self, name, values)

    @classmethod
    def from_prompt_and_completion(cls, prompt_tokens: ArrayLike, completion_tokens: ArrayLike) -> "Datum":
        """Teaches to continue `prompt_tokens` with `completion_tokens`; N is their total length less one.

        Targets are the tokens moved on by one; weights are 1 where the target belongs to the completion, 0 where it
        belongs to the prompt. ValueError when either is empty.
        """
        prompt = token_array(prompt_tokens, "prompt_tokens", np.int64)
        completion = token_array(completion_tokens, "completion_tokens", np.int64)
        if not (len(prompt) and len(completion)):
            raise ValueError(
                f"{len(prompt)} prompt_tokens and {len(completion)} completion_tokens: both need at least one"
            )
        sequence = np.concatenate([prompt, completion])
        weights = np.concatenate([np.zeros(len(prompt) - 1), np.ones(len(completion))])
        return cls(tokens=sequence[:-1], target_tokens=sequence[1:], weights=weights)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(np.asarray(self.tokens))

    def to_proto(self, loss: Loss = "cross_entropy") -> trainer_pb2.Datum:
        """The message for Forward and ForwardBackward. ValueError when an input that the loss takes is absent."""
        datum = trainer_pb2.Datum(tokens=np.asarray(self.tokens).tolist())
        datum.loss_inputs["target_tokens"].CopyFrom(tensors.encode(np.asarray(self.target_tokens)))
        for name in _REQUIRED_INPUTS[loss]:
            if getattr(self, name) is None:
                raise ValueError(f"{loss} takes {name}, and the datum has none")
        for name in _REQUIRED_INPUTS[loss] + _OPTIONAL_INPUTS.get(loss, ()):
            if getattr(self, name) is not None:
                datum.loss_inputs[name].CopyFrom(tensors.encode(getattr(self, name)))
        return datum


def loss_function(loss: Loss) -> trainer_pb2.LossFunction:
    """The loss on the wire. ValueError when there is none of that name."""
    if loss not in _REQUIRED_INPUTS:
        raise ValueError(f"loss {loss!r} is not one of {', '.join(_REQUIRED_INPUTS)}")
    return getattr(trainer_pb2, f"LOSS_FUNCTION_{loss.upper()}")


def transport_to_proto(transport: Transport) -> trainer_pb2.Transport:
    """The transport on the wire. ValueError when there is none of that name."""
    if transport not in _TRANSPORTS:
        raise ValueError(f"transport {transport!r} is not one of {', '.join(_TRANSPORTS)}")
    return _TRANSPORTS[transport]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Numbers that a loss takes; what is None is the loss's own default."""

    clip_low_threshold: float | None = None
    """ppo and cispo: clip(ratio) is at least this. Finite, >= 0. 0.8 for ppo, 0 for cispo."""
    clip_high_threshold: float | None = None
    """ppo and cispo: clip(ratio) is at most this. Finite, >= clip_low_threshold. 1.2 for ppo, 4 for cispo."""
    beta: float | None = None
    """dro: finite, >= 0. 0.05."""

    def to_proto(self) -> trainer_pb2.LossConfig:
        """The message for Forward and ForwardBackward."""
        return trainer_pb2.LossConfig(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class AdamParams:
    """Hyper-parameters of one AdamW step; the defaults are the service's."""

    learning_rate: float = 1e-4
    """Finite, >= 0."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the second moment, in [0, 1)."""
    eps: float = 1e-12
    """Finite, > 0."""
    weight_decay: float = 0.0
    """Decoupled from the gradient; finite, >= 0."""
    grad_clip_norm: float = 0.0
    """The gradient is scaled down to this L2 norm when it is larger; 0 means no clipping."""

    def to_proto(self) -> trainer_pb2.AdamParams:
        """The message for OptimStep."""
        return trainer_pb2.AdamParams(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample; the defaults are the service's."""

    n: int = 1
    """Completions per prompt, 1 to 128."""
    max_tokens: int | None = None
    """Most tokens per completion. None means as many as fit in the model's context."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling, in (0, 1]."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 means all."""
    seed: int | None = None
    """Makes the completions repeatable. None means random."""
    stop: str | Sequence[str] = ()
    """Strings that end a completion; they are left out of its text."""
    logprobs: int | None = None
    """Alternatives to report beside each sampled token's own logprob, at most 20. None means no logprobs at all.

    They are the model's own, before anything here changes its distribution: importance ratios need temperature 1 and
    the other defaults."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end a completion, as its last one."""
    min_p: float = 0.0
    """Sample only from tokens that are at least this likely relative to the likeliest one; 0 to 1."""
    repetition_penalty: float = 1.0
    """Above 1 against tokens that prompt or completion have; above 0, at most 2."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the completion has; -2 to 2."""
    frequency_penalty: float = 0.0
    """Likewise, times how often it has them."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to these tokens' logits; -100 to 100."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for the tokens of the prompt after the first."""
    json_schema: str | Mapping[str, Any] | None = None
    """The text must be JSON of this JSON Schema. One of the four at most."""
    regex: str | None = None
    """The text must be matched by this from start to end."""
    choice: Sequence[str] | None = None
    """The text must be one of these."""
    grammar: str | None = None
    """The text must be of this context-free grammar, in EBNF or GBNF as xgrammar reads it."""

    def to_proto(self) -> sampler_pb2.SamplingParams:
        """The message for Generate. ValueError when more than one structure is asked for."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if sum(fields[name] is not None for name in ("json_schema", "regex", "choice", "grammar")) > 1:
            raise ValueError("a text can have one of json_schema, regex, choice and grammar")
        if isinstance(self.stop, str):
            fields["stop"] = [self.stop]
        if isinstance(self.json_schema, Mapping):
            fields["json_schema"] = json.dumps(self.json_schema)
        if self.choice is not None:
            fields["choice"] = sampler_pb2.Choice(options=self.choice)
        return sampler_pb2.SamplingParams(**fields)


def set_prompt(request: sampler_pb2.GenerateRequest, prompt: Prompt) -> None:
    """Fills the request's prompt. ValueError or TypeError when `prompt` is none of what `Prompt` allows."""
    if isinstance(prompt, str):
        request.text = prompt
    elif len(prompt) and isinstance(prompt[0], Mapping):
        request.chat.messages.extend(sampler_pb2.ChatMessage(**message) for message in prompt)  # type: ignore[arg-type]
    else:
        request.tokens.tokens.extend(token_array(prompt, "prompt", np.int32).tolist())  # type: ignore[arg-type]


def token_array(tokens: ArrayLike, name: str, dtype: type[np.integer]) -> np.ndarray:
    """Token ids as an array of `dtype` [N]. ValueError, naming `name`, unless they are integers that fit."""
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; give one sequence of token ids")
    if array.size == 0:
        return np.empty(0, dtype)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {array.dtype}; token ids are integers")
    limits = np.iinfo(dtype)
    if array.min() < limits.min or array.max() > limits.max:
        raise ValueError(f"{name} has ids from {array.min()} to {array.max()}, which do not fit {limits.dtype}")
    return array.astype(dtype)
