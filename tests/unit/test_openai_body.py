"""Bodies of requests over OpenAI's HTTP API, before vLLM sees them."""

import json

import pytest

from sampler_service import openai_body
from service_common.errors import Code, ServiceError

VOCAB_SIZE = 100
DEEP: dict = {}
for _ in range(60):
    DEEP = {"properties": {"a": DEEP}}


def parsed(**fields) -> dict:
    return openai_body.parsed(json.dumps({"model": "m", "prompt": "a"} | fields).encode(), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", "65"),
        ("n", 65.0),
        ("n", True),
        ("stop_token_ids", [VOCAB_SIZE]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [5] * 113),
        ("allowed_token_ids", [VOCAB_SIZE]),
        ("allowed_token_ids", [5] * 1025),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("bad_words", ["a"] * 65),
        ("bad_words", ["sea" * 200]),
        ("bad_words", [" "]),
        ("bad_words", "sea"),
        ("top_k", 1 << 70),
        ("structured_outputs", {"regex": "a" * 65_537}),
        ("response_format", {"type": "text", "pad": "a" * 65_537}),
    ],
)
def test_what_would_harm_the_engine_is_refused_and_named(field, value):
    with pytest.raises(ServiceError) as refusal:
        parsed(**{field: value})
    assert (refusal.value.code, refusal.value.reason) == (Code.INVALID_ARGUMENT, "BODY_INVALID")
    assert refusal.value.field == field
    assert len(refusal.value.message) < 200


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"stop": ["\\ud800"]}',
        json.dumps({"structured_outputs": {"json": DEEP}}).encode(),
        json.dumps({"structured_outputs": {"json": json.dumps(DEEP)}}).encode(),
        json.dumps({"structured_outputs": {"structural_tag": json.dumps(DEEP)}}).encode(),
        json.dumps({"structured_outputs": {"structural_tag": "{"}}).encode(),
    ],
)
def test_what_is_no_body_is_refused(content):
    with pytest.raises(ServiceError) as refusal:
        openai_body.parsed(content, VOCAB_SIZE)
    assert refusal.value.reason == "BODY_INVALID"


def test_what_vllm_takes_is_left_as_it_is():
    fields = {
        "n": 2,
        "stop_token_ids": [0, 99],
        "allowed_token_ids": list(range(100)),
        "bad_words": ["sea", "die See"],
        "logit_bias": {"5": 1.5},
        "structured_outputs": {"json": json.dumps({"type": "object"})},
        "seed": 5,
    }
    assert parsed(**fields) == {"model": "m", "prompt": "a"} | fields
    nothing = dict.fromkeys(fields)
    assert parsed(**nothing) == {"model": "m", "prompt": "a"} | nothing


@pytest.mark.parametrize("seed", [(1 << 63) - 1, -(1 << 63), 1 << 70])
def test_any_seed_is_one_to_which_an_index_can_be_added(seed):
    assert 0 <= parsed(seed=seed)["seed"] < 1 << 62


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": None}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": []}, 1),
        ({"prompt": None}, 1),
    ],
)
def test_a_body_asks_for_as_many_completions(fields, number):
    assert openai_body.num_sequences(parsed(**fields)) == number
