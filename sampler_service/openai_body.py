"""What the body of a request over OpenAI's HTTP API may hold, beside what vLLM's routes look at themselves.

vLLM checks some of it in its workers alone, where an exception ends the engine, and everybody's requests with it.
"""

import json
from typing import Any

from sampler_service.requests import (
    MAX_BIASES,
    MAX_SCHEMA_LEVELS,
    MAX_STOP_TOKEN_IDS,
    MAX_STRUCTURE_CHARACTERS,
    levels,
)
from service_common import errors
from service_common.errors import ServiceError

MAX_BODY_BYTES = 8 << 20
# A schema is some levels down in a request's body.
_MAX_BODY_LEVELS = MAX_SCHEMA_LEVELS + 8
# The tables that vLLM's model runner has for a request (vllm/v1/worker/gpu/sample). A bad word is two sequences of
# tokens, one with a space before it, and a token is at least one byte.
_MAX_STOP_TOKEN_IDS = MAX_STOP_TOKEN_IDS - 16  # vLLM adds those that end the model's own texts
_MAX_ALLOWED_TOKEN_IDS = 1024
_MAX_BAD_WORDS = 64
_MAX_BAD_WORD_BYTES = 512


def parsed(content: bytes, vocab_size: int) -> dict[str, Any]:
    """The body, with a seed to which vLLM can add a completion's index.

    INVALID_ARGUMENT (BODY_INVALID), naming the field, unless vLLM can be given it.
    """
    try:
        body = json.loads(content)
        if not isinstance(body, dict):
            raise ValueError("it is not an object")
        json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair cannot be sent to vLLM's engine
        depth = levels(body) + _levels_in_text(body.get("structured_outputs"))
    except (ValueError, RecursionError) as cause:
        raise errors.invalid_argument("BODY_INVALID", f"the body is not JSON as it should be: {cause}") from cause
    if depth > _MAX_BODY_LEVELS:
        raise errors.invalid_argument(
            "BODY_INVALID", f"the body's objects are nested {depth} levels deep, and can be {_MAX_BODY_LEVELS}"
        )
    for field in ("response_format", "structured_outputs"):
        characters = len(json.dumps(body.get(field)))
        if characters > MAX_STRUCTURE_CHARACTERS:
            raise _invalid(field, f"has {characters} characters, and can have {MAX_STRUCTURE_CHARACTERS}")
    if type(body.get("seed")) is int:
        body["seed"] %= 1 << 62
    for field, value in body.items():
        if type(value) is int and not -(1 << 63) <= value < 1 << 63:
            raise _invalid(field, "is a number of more than 64 bits")
    if body.get("n") is not None and type(body["n"]) is not int:
        raise _invalid("n", f"is {body['n']!r}, and must be a whole number")
    _check_tokens(body, "stop_token_ids", _MAX_STOP_TOKEN_IDS, vocab_size)
    _check_tokens(body, "allowed_token_ids", _MAX_ALLOWED_TOKEN_IDS, vocab_size)
    _check_bad_words(body.get("bad_words"))
    biases = body.get("logit_bias")
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise _invalid("logit_bias", f"has {len(biases)} tokens, and can have {MAX_BIASES}")
    return body


def num_sequences(body: dict[str, Any]) -> int:
    """Completions that a parsed body asks for. What is no prompt here is refused by vLLM's routes."""
    n, prompts = body.get("n"), body.get("prompt")
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        prompts = [prompts]
    return len(prompts) * max(1, n or 1)


def _levels_in_text(structure: object) -> int:
    """Of the schemas that are JSON in a string."""
    texts = [structure.get(kind) for kind in ("json", "structural_tag")] if isinstance(structure, dict) else []
    return max((levels(json.loads(text)) for text in texts if isinstance(text, str)), default=0)


def _check_tokens(body: dict[str, Any], field: str, most: int, vocab_size: int) -> None:
    tokens = body.get(field)
    if tokens is None:
        return
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise _invalid(field, f"must be a list of token ids from 0 to {vocab_size - 1}")
    if len(tokens) > most:
        raise _invalid(field, f"has {len(tokens)} tokens, and can have {most}")


def _check_bad_words(words: object) -> None:
    if words is None:
        return
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise _invalid("bad_words", "must be a list of words")
    size = sum(len(word.encode()) + 1 for word in words)
    if len(words) > _MAX_BAD_WORDS or size > _MAX_BAD_WORD_BYTES:
        raise _invalid(
            "bad_words",
            f"has {len(words)} words of {size} bytes, and can have {_MAX_BAD_WORDS} of {_MAX_BAD_WORD_BYTES}",
        )


def _invalid(field: str, what: str) -> ServiceError:
    return errors.invalid_argument("BODY_INVALID", f"{field} {what}", field=field)
