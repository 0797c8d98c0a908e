"""What can be asked of the sampler and what it answers, as plain values, and the checks on the former."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from service_common import errors

MAX_COMPLETIONS = 128
MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20
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


@dataclass(frozen=True)
class Position:
    """The sampled token's logprob, and (token, logprob) of the likeliest ones in descending order."""

    logprob: float
    top: list[tuple[int, float]]


class Finish(enum.Enum):
    """Why a completion ended: at an end-of-sequence token or stop string, or at a limit of length."""

    STOP = enum.auto()
    LENGTH = enum.auto()


@dataclass(frozen=True)
class Delta:
    """New tokens of completion `index`; `logprobs` has one entry per token if they were asked for."""

    index: int
    tokens: list[int]
    text: str
    logprobs: list[Position]
    finish: Finish | None


def check_sampling(sampling: Sampling) -> None:
    """INVALID_ARGUMENT, naming the field and its value, unless every value is in its range."""
    in_range = {
        "n": (1 <= sampling.n <= MAX_COMPLETIONS, f"from 1 to {MAX_COMPLETIONS}"),
        "max_tokens": (sampling.max_tokens is None or sampling.max_tokens >= 1, "at least 1"),
        "temperature": (0 <= sampling.temperature <= MAX_TEMPERATURE, f"from 0 to {MAX_TEMPERATURE:g}"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, "at least 0"),
        "stop": (all(sampling.stop), "strings that are not empty"),
        "logprobs": (sampling.logprobs is None or 0 <= sampling.logprobs <= MAX_TOP_LOGPROBS, "from 0 to 20"),
    }
    for name, (fine, wanted) in in_range.items():
        if not fine:
            value = getattr(sampling, name)
            raise errors.invalid_argument(
                "SAMPLING_INVALID",
                f"sampling.{name} is {value}, and must be {wanted}",
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
