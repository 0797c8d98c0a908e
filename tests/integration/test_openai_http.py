"""OpenAI's API as a client sees it, on the sampler that the gRPC tests use."""

import asyncio
import json

import httpx
import openai
import pytest
from random_adapters import random_adapter

from service_common.checkpoint import Checkpoint
from tinkerbell import AsyncSamplerClient

pytestmark = pytest.mark.engine

STORY = "Once upon a time, in a village by the sea,"
BASE = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
async def sampler(sampler_process):
    async with AsyncSamplerClient(sampler_process.address) as made:
        yield made


@pytest.fixture(scope="session")
async def client(sampler_process, http_address):
    async with openai.AsyncOpenAI(base_url=f"http://{http_address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
async def http(sampler_process, http_address):
    async with httpx.AsyncClient(base_url=f"http://{http_address}", timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def checkpoint(smollm2) -> Checkpoint:
    return Checkpoint(str(smollm2), smollm2)


async def push(sampler, checkpoint, adapter_id: str, version: int, seed: int) -> str:
    """The digest."""
    weights = random_adapter(checkpoint, seed).tensors
    return (await sampler.push_adapter(adapter_id, version, weights, rank=8, alpha=16.0)).version.digest


@pytest.fixture(scope="session")
async def olga(sampler, checkpoint) -> list[str]:
    """The digests of her versions 1 and 2."""
    return [await push(sampler, checkpoint, "olga", number, 50 + number) for number in (1, 2)]


async def over_grpc(sampler, adapter_id: str = "", version: int = 0) -> str:
    result = await sampler.generate(STORY, adapter_id=adapter_id, version=version, temperature=0, max_tokens=12)
    return result.text


async def active(sampler) -> tuple[int, int]:
    info = await sampler.get_backend_info()
    return info.active_requests, info.active_sequences


async def until_active(sampler, requests: int, sequences: int) -> None:
    async with asyncio.timeout(10):
        while await active(sampler) != (requests, sequences):  # noqa: ASYNC110 - the sampler tells nobody
            await asyncio.sleep(0.05)


def complete(client, model: str, **options):
    return client.completions.create(model=model, prompt=STORY, **{"temperature": 0, "max_tokens": 12} | options)


async def test_models_are_the_base_model_and_what_is_live(client, olga):
    models = {model.id: model async for model in client.models.list()}
    assert {BASE, "olga", "olga@1", "olga@2"} <= set(models)
    assert (models["olga"].root, models["olga"].parent) == ("olga@2", BASE)
    assert models["olga@1"].root == "olga@1"


async def test_a_name_is_the_latest_version_and_a_number_pins_one(client, sampler, olga, checkpoint):
    texts = []
    for model, adapter_id, version, digest in (
        (BASE, "", 0, checkpoint.fingerprint),
        ("olga@1", "olga", 1, olga[0]),
        ("olga", "olga", 2, olga[1]),
    ):
        raw = await client.completions.with_raw_response.create(model=model, prompt=STORY, temperature=0, max_tokens=12)
        answer = raw.parse()
        assert answer.model == (f"olga@{version}" if version else BASE)
        assert (raw.headers["x-tinkerbell-adapter"], raw.headers["x-tinkerbell-version"]) == (adapter_id, str(version))
        assert raw.headers["x-tinkerbell-digest"] == digest
        assert answer.choices[0].text == await over_grpc(sampler, adapter_id, version)
        texts.append(answer.choices[0].text)
    assert len(set(texts)) == 3


async def test_chats_and_streams(client, olga):
    messages = [{"role": "user", "content": "Say hello."}]
    options = {"model": "olga", "messages": messages, "temperature": 0, "max_tokens": 12}
    whole = await client.chat.completions.create(**options)
    chunks = [chunk async for chunk in await client.chat.completions.create(**options, stream=True)]
    assert {whole.model, *(chunk.model for chunk in chunks)} == {"olga@2"}
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content


async def test_two_versions_in_one_batch_of_the_engine_are_what_they_are_alone(client, sampler, olga):
    answers = await asyncio.gather(*(complete(client, model) for model in ("olga@1", "olga@2", BASE) * 2))
    expected = [await over_grpc(sampler, *asker) for asker in (("olga", 1), ("olga", 2), ())]
    assert [answer.choices[0].text for answer in answers] == expected * 2


async def test_schemas_are_kept_to(client, olga):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model="olga",
        messages=[{"role": "user", "content": "How old?"}],
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "age", "schema": schema}},
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["age"], int)


@pytest.mark.parametrize("model", ["nobody", "nobody@1", "olga@99", "olga@", "olga@two", "olga@" + "9" * 5000, "@1"])
async def test_an_unknown_model_is_not_found_and_the_answer_says_what_there_is(client, olga, model):
    with pytest.raises(openai.NotFoundError) as caught:
        await complete(client, model)
    error = caught.value.body
    assert error["code"] == ("VERSION_NOT_FOUND" if model == "olga@99" else "ADAPTER_NOT_FOUND")
    assert error["param"] == "model"
    assert BASE in error["message"]
    assert ("1, 2" if model == "olga@99" else "olga") in error["message"]


DEEP = json.loads('{"a":' * 60 + "{}" + "}" * 60)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        json.dumps({"prompt": "a"}).encode(),
        json.dumps({"model": 7, "prompt": "a"}).encode(),
        *(
            json.dumps({"model": BASE, "prompt": STORY, "max_tokens": 4} | part).encode()
            for part in (
                {"n": 0},
                {"n": 65},
                {"n": "two"},
                {"prompt": ["a"] * 65},
                {"prompt": [[]]},
                {"prompt": [1, 999_999]},
                {"prompt": [-1]},
                {"prompt": "sea " * 5000},
                {"temperature": -1},
                {"temperature": float("nan")},
                {"temperature": float("inf")},
                {"top_p": 2},
                {"logprobs": 10_000},
                {"logit_bias": {"999999": 1}},
                {"n": "65"},
                {"n": 65.0},
                {"stop_token_ids": "a"},
                {"stop_token_ids": [999_999], "min_tokens": 1},
                {"structured_outputs": {"structural_tag": json.dumps(DEEP)}},
                {"structured_outputs": {"regex": "("}},
                {"structured_outputs": {"grammar": "root ::="}},
                {"structured_outputs": {"regex": "a" * 65_537}},
                {"structured_outputs": {"json": {"type": "wizard"}}},
                {"structured_outputs": {"json": DEEP}},
                {"structured_outputs": {"json": json.dumps(DEEP)}},
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": DEEP}}},
            )
        ),
    ],
)
async def test_a_bad_body_is_refused_and_harms_nobody(http, client, sampler, bad):
    answer = await http.post("/v1/completions", content=bad, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert await active(sampler) == (0, 0)
    assert (await complete(client, BASE, max_tokens=1)).usage.completion_tokens == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"n": 2, "seed": 2**63 - 1},
        {"n": 2, "seed": -(2**63)},
        {"logit_bias": {"5": 1e300}},
        {"logit_bias": {"5": float("nan")}},
        {"repetition_penalty": 1e300},
        {"bad_words": ["sea"], "min_tokens": 3},
        {"prompt_logprobs": 3},
        {"use_beam_search": True, "n": 3},
        {"echo": True, "logprobs": 2},
        {"user": "x" * 10_000},
    ],
)
async def test_an_odd_body_harms_nobody(http, client, sampler, olga, odd):
    body = json.dumps({"model": "olga", "prompt": STORY, "temperature": 0, "max_tokens": 12} | odd)
    answer = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    await until_active(sampler, 0, 0)
    assert (await complete(client, "olga", max_tokens=1)).usage.completion_tokens == 1


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/update_weights",
        "/pause",
        "/scale_elastic_ep",
        "/v1/responses",
        "/v1/chat/completions/batch",
        "/server_info",
        "/invocations",
        "/docs",
    ],
)
async def test_nothing_else_is_served(http, path):
    for method in ("GET", "POST"):
        assert (await http.request(method, path, json={})).status_code in (404, 405)


async def test_a_full_sampler_answers_429_and_says_when_to_come_back(client, sampler):
    busy = sampler.generate(STORY, n=60)
    await until_active(sampler, 1, 60)
    with pytest.raises(openai.RateLimitError) as caught:
        await complete(client, BASE, n=5)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.body["code"] == "SAMPLER_FULL"
    busy.cancel()
    await until_active(sampler, 0, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_version_stays_until_its_response_has_ended_also_when_the_client_is_gone(
    client, http, sampler, checkpoint, stream
):
    name = f"paul-{stream}"
    await push(sampler, checkpoint, name, 1, seed=61)
    body = {"model": name, "prompt": STORY, "max_tokens": 1500, "ignore_eos": True, "stream": stream}
    started = asyncio.Event()

    async def ask():
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                started.set()

    asking = asyncio.create_task(ask())
    await until_active(sampler, 1, 1)
    if stream:
        await started.wait()
    assert await sampler.unload_adapter(name) == [1]
    with pytest.raises(openai.NotFoundError):
        await complete(client, name)
    # Longer than the sampler waits between a version's last request and its end in the workers, where a request that
    # still runs on it would take vLLM down.
    await asyncio.sleep(2)
    assert await active(sampler) == (1, 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until_active(sampler, 0, 0)
    await asyncio.sleep(2)
    assert (await complete(client, BASE, max_tokens=4)).usage.completion_tokens == 4
