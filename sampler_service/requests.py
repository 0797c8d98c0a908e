"""What can be asked of the sampler and what it answers, as plain values, and the checks on the former."""

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service_common import errors

MAX_COMPLETIONS = 128
MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20
MAX_REPETITION_PENALTY = 2.0
MAX_PENALTY = 2.0  # presence and frequency, either way
MAX_BIAS = 100.0  # likewise
# As many as vLLM's model runner has room for in a request (vllm/v1/worker/gpu/sample/logit_bias.py).
MAX_STOP_TOKEN_IDS = 128
MAX_BIASES = 1024

# Structures are turned into grammars on the event loop, in a time that grows with the cube of a schema's depth.
MAX_STRUCTURE_CHARACTERS = 1 << 16
MAX_SCHEMA_LEVELS = 32
CHAT_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids, used as they are."""

    tokens: Sequence[int]


@dataclass(frozen=True)
class TextPrompt:
    """Text for the base model's tokenizer."""

    text: str


@dataclass(frozen=True)
class ChatPrompt:
    """(role, content) pairs for the base model's chat template."""

    messages: Sequence[tuple[str, str]]


Prompt = TokenPrompt | TextPrompt | ChatPrompt


@dataclass(frozen=True)
class Structure:
    """What a completion's text must be; `kind` is the field of `SamplingParams.structure`."""

    kind: str
    value: str | tuple[str, ...]


@dataclass(frozen=True)
class Sampling:
    """How to sample; `SamplingParams` in sampler.proto explains the fields. None is what is absent there."""

    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    prompt_logprobs: int | None = None
    structure: Structure | None = None


@dataclass(frozen=True)
class Request:
    """A prompt to complete. `adapter_id` "" is the bare base model, `version` 0 the adapter's latest."""

    adapter_id: str
    version: int
    prompt: Prompt
    sampling: Sampling


@dataclass(frozen=True)
class Position:
    """The token's logprob, and (token, logprob) of the likeliest ones in descending order."""

    logprob: float
    top: list[tuple[int, float]]


class Finish(enum.Enum):
    """Why a completion ended: at its own end or where the request wanted it, or at a limit of length."""

    STOP = enum.auto()
    LENGTH = enum.auto()


@dataclass(frozen=True)
class Delta:
    """New tokens of completion `index`; `logprobs` has one entry per token if they were asked for.

    `prompt_logprobs`, if asked for, are in the first delta of all: one entry per token of the prompt after the first.
    """

    index: int
    tokens: list[int]
    text: str
    logprobs: list[Position]
    finish: Finish | None
    prompt_logprobs: list[Position] = field(default_factory=list)


@dataclass
class Completion:
    """A completion as far as it has come; the fields are those of `Delta`."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Position] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        """Appends its next part."""
        self.tokens += delta.tokens
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.finish = delta.finish


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """INVALID_ARGUMENT, naming the field and its value, unless every value is in its range."""

    def is_count(logprobs: int | None) -> bool:
        return logprobs is None or 0 <= logprobs <= MAX_TOP_LOGPROBS

    def is_penalty(penalty: float) -> bool:
        return -MAX_PENALTY <= penalty <= MAX_PENALTY

    count, penalty = f"from 0 to {MAX_TOP_LOGPROBS}", f"from {-MAX_PENALTY:g} to {MAX_PENALTY:g}"
    in_range = {
        "n": (1 <= sampling.n <= MAX_COMPLETIONS, f"from 1 to {MAX_COMPLETIONS}"),
        "max_tokens": (sampling.max_tokens is None or sampling.max_tokens >= 1, "at least 1"),
        "temperature": (0 <= sampling.temperature <= MAX_TEMPERATURE, f"from 0 to {MAX_TEMPERATURE:g}"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, "at least 0"),
        "stop": (all(sampling.stop), "strings that are not empty"),
        "logprobs": (is_count(sampling.logprobs), count),
        "min_p": (0 <= sampling.min_p <= 1, "from 0 to 1"),
        "repetition_penalty": (
            0 < sampling.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"above 0 and at most {MAX_REPETITION_PENALTY:g}",
        ),
        "presence_penalty": (is_penalty(sampling.presence_penalty), penalty),
        "frequency_penalty": (is_penalty(sampling.frequency_penalty), penalty),
        "prompt_logprobs": (is_count(sampling.prompt_logprobs), count),
    }
    for name, (fine, wanted) in in_range.items():
        if not fine:
            raise _sampling_invalid(name, getattr(sampling, name), wanted)
    for name, most in (("stop_token_ids", MAX_STOP_TOKEN_IDS), ("logit_bias", MAX_BIASES)):
        if len(getattr(sampling, name)) > most:
            raise _sampling_invalid(name, f"{len(getattr(sampling, name))} tokens", f"{most} at most")
        for token in getattr(sampling, name):
            if not 0 <= token < vocab_size:
                raise _sampling_invalid(name, token, f"token ids from 0 to {vocab_size - 1}")
    for bias in sampling.logit_bias.values():
        if not math.fabs(bias) <= MAX_BIAS:
            raise _sampling_invalid("logit_bias", bias, f"from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    if sampling.structure:
        _check_structure(sampling.structure)


def _check_structure(structure: Structure) -> None:
    if not structure.value or not all(structure.value):
        raise _sampling_invalid(structure.kind, structure.value, "something that is not empty")
    characters = sum(map(len, structure.value))
    if characters > MAX_STRUCTURE_CHARACTERS:
        raise structure_invalid(structure, f"it has {characters} characters, and can have {MAX_STRUCTURE_CHARACTERS}")
    if structure.kind == "json_schema":
        try:
            schema = json.loads(str(structure.value))
            depth = levels(schema)
        except (ValueError, RecursionError) as cause:
            raise structure_invalid(structure, str(cause)) from cause
        if not isinstance(schema, dict):
            raise structure_invalid(structure, "a JSON Schema is an object")
        if depth > MAX_SCHEMA_LEVELS:
            why = f"its objects are nested {depth} levels deep, and can be {MAX_SCHEMA_LEVELS}"
            raise structure_invalid(structure, why)


def levels(value: object) -> int:
    """How deep the objects of a JSON value are nested in one another."""
    match value:
        case dict():
            return 1 + max(map(levels, value.values()), default=0)
        case list():
            return max(map(levels, value), default=0)
        case _:
            return 0


def structure_invalid(structure: Structure, why: str) -> errors.ServiceError:
    """INVALID_ARGUMENT for a structure that cannot be followed."""
    return errors.invalid_argument(
        "STRUCTURE_INVALID",
        f"sampling.{structure.kind} cannot be followed: {why}",
        field=f"sampling.{structure.kind}",
        kind=structure.kind,
    )


def _sampling_invalid(name: str, value: object, wanted: str) -> errors.ServiceError:
    return errors.invalid_argument(
        "SAMPLING_INVALID",
        f"sampling.{name} has {value}, and must be {wanted}",
        field=f"sampling.{name}",
        parameter=name,
        value=value,
    )


def check_messages(messages: Sequence[tuple[str, str]]) -> None:
    """INVALID_ARGUMENT unless there are messages and all have a known role."""
    if not messages:
        raise errors.invalid_argument("PROMPT_EMPTY", "the chat has no messages", field="chat.messages")
    for index, (role, _) in enumerate(messages):
        if role not in CHAT_ROLES:
            raise errors.invalid_argument(
                "CHAT_ROLE_UNKNOWN",
                f"message {index} has role {role!r}, and must have one of {', '.join(CHAT_ROLES)}",
                field=f"chat.messages[{index}].role",
                role=role,
            )


def check_tokens(tokens: Sequence[int], field: str, vocab_size: int, minimum: int, maximum: int) -> None:
    """INVALID_ARGUMENT unless the sequence's length is in [minimum, maximum] and its ids in [0, vocab_size)."""
    if not tokens:
        raise errors.invalid_argument("PROMPT_EMPTY", f"{field} is empty", field=field)
    if len(tokens) < minimum:
        raise errors.invalid_argument(
            "SEQUENCE_TOO_SHORT",
            f"{field} has {len(tokens)} tokens, and needs at least {minimum}",
            field=field,
            tokens=len(tokens),
        )
    if len(tokens) > maximum:
        raise errors.invalid_argument(
            "SEQUENCE_TOO_LONG",
            f"{field} has {len(tokens)} tokens, and can have {maximum}: the model's context less one new token",
            field=field,
            tokens=len(tokens),
            max_tokens=maximum,
        )
    for index, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise errors.invalid_argument(
                "TOKEN_OUT_OF_RANGE",
                f"{field}[{index}] is {token}, and ids go from 0 to {vocab_size - 1}",
                field=field,
                index=index,
                token=token,
                vocab_size=vocab_size,
            )
