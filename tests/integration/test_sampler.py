"""The sampler as a client sees it: one real process, SmolLM2, vLLM.

Log-probabilities are within 1e-3 of those that Hugging Face and PEFT compute in float32, and of the same ones computed
beside other requests. In bfloat16 the former are within 0.1 in the mean and the latter within 0.25 each, and greedy
tokens are the same up to a choice between two whose log-probabilities are that close.
"""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterable
from itertools import islice

import device
import grpc
import numpy as np
import psutil
import pytest
import torch
import transformers
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from processes import start_sampler, wait_ready
from prometheus_client.parser import text_string_to_metric_families
from random_adapters import Adapter, logprobs, peft_model, push_frames, random_adapter

from service_common.checkpoint import Checkpoint
from tinkerbell import errors, tensors
from tinkerbell import push as client_push
from tinkerbell.v1 import common_pb2, sampler_pb2, sampler_pb2_grpc

pytestmark = pytest.mark.engine

Tokens = common_pb2.TokenSequence
STORY = "Once upon a time, in a village by the sea,"
ROUNDING = device.tolerance(1e-3, 0.25)
REFERENCE = device.tolerance(1e-3, 0.2)  # in the mean; Hugging Face in bfloat16 is 0.09 from its own float32


@pytest.fixture(scope="session")
def checkpoint(smollm2) -> Checkpoint:
    return Checkpoint(str(smollm2), smollm2)


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def base(smollm2):
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
async def channel(sampler_process):
    async with grpc.aio.insecure_channel(sampler_process.address) as channel:
        yield channel


@pytest.fixture(scope="session")
async def stub(channel):
    return sampler_pb2_grpc.SamplerServiceStub(channel)


async def push(channel, adapter: Adapter, adapter_id: str, version: int) -> sampler_pb2.PushCommitted:
    begin = sampler_pb2.PushBegin(adapter_id=adapter_id, version=version, manifest=adapter.manifest)
    return await client_push.push(channel, begin, adapter.payload)


@pytest.fixture(scope="session")
async def v1(channel, checkpoint) -> Adapter:
    """Live as version 1 of "anna", and version 2 is `v2`."""
    adapter = random_adapter(checkpoint, seed=1, b_std=0.05)
    await push(channel, adapter, "anna", 1)
    return adapter


@pytest.fixture(scope="session")
async def v2(channel, checkpoint, v1) -> Adapter:
    adapter = random_adapter(checkpoint, seed=2, rank=16, alpha=32.0, b_std=0.05)
    await push(channel, adapter, "anna", 2)
    return adapter


async def generate(stub, adapter_id: str = "", version: int = 0, text: str = STORY, **sampling):
    """(served_by, tokens, text, logprobs, finish reason) per completion."""
    request = sampler_pb2.GenerateRequest(
        adapter_id=adapter_id, version=version, text=text, sampling=sampler_pb2.SamplingParams(**sampling)
    )
    completions = [([], [], []) for _ in range(sampling.get("n", 1))]
    finish = {}
    async for response in stub.Generate(request):
        ids, texts, positions = completions[response.index]
        ids.extend(response.tokens)
        texts.append(response.text)
        positions.extend(response.logprobs)
        served_by = response.served_by
        if response.finish_reason:
            assert response.index not in finish, "nothing follows a completion's last message"
            finish[response.index] = response.finish_reason
    return [
        (served_by, ids, "".join(texts), scores, finish[index])
        for index, (ids, texts, scores) in enumerate(completions)
    ]


async def scores(stub, tokens: list[int], adapter_id: str = "", version: int = 0):
    response = await stub.ComputeLogprobs(
        sampler_pb2.ComputeLogprobsRequest(
            adapter_id=adapter_id, version=version, sequences=[Tokens(tokens=tokens), Tokens(tokens=tokens[:5])]
        )
    )
    whole, start = (tensors.decode(array) for array in response.logprobs)
    np.testing.assert_allclose(start, whole[:4], atol=ROUNDING)
    return response.served_by, whole


async def assert_greedy_alike(stub, prompt: list[int], ours, expected, adapter_id: str = "", version: int = 0) -> None:
    """The same tokens, up to a choice that rounding decides."""
    at = device.first_difference(ours, expected)
    if at is not None:
        tried = [
            (await scores(stub, [*prompt, *expected[:at], token], adapter_id, version))[1][-1]
            for token in (ours[at], expected[at])
        ]
        assert abs(tried[0] - tried[1]) <= ROUNDING, f"token {at} is {ours[at]} and not {expected[at]}"


async def refusal(call) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo]:
    """Code and ErrorInfo of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "tinkerbell"
    return caught.value.code(), info


async def pushed(stub, frames: Iterable[sampler_pb2.PushAdapterRequest]):
    """The sampler's answers to these frames. As a client should, it waits for the one to BEGIN before it goes on."""
    call = stub.PushAdapter()
    for index, frame in enumerate(frames):
        await call.write(frame)
        if index == 0:
            yield await call.read()
    await call.done_writing()
    while (answer := await call.read()) is not grpc.aio.EOF:
        yield answer


async def active(stub) -> tuple[int, int]:
    """Requests and sequences."""
    info = await stub.GetBackendInfo(sampler_pb2.SamplerServiceGetBackendInfoRequest())
    return info.active_requests, info.active_sequences


async def versions(stub, adapter_id: str):
    response = await stub.ListAdapters(sampler_pb2.ListAdaptersRequest())
    return next(adapter.versions for adapter in response.adapters if adapter.adapter_id == adapter_id)


async def until_idle(stub) -> None:
    for _ in range(200):
        if await active(stub) == (0, 0):
            return
        await asyncio.sleep(0.05)
    pytest.fail("requests still run after 10 s")


def metric(address: str, name: str) -> float:
    """What Prometheus would see; all engines together."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


async def live(stub) -> dict[str, list[int]]:
    response = await stub.ListAdapters(sampler_pb2.ListAdaptersRequest())
    return {adapter.adapter_id: [live.version for live in adapter.versions] for adapter in response.adapters}


async def test_the_base_model_is_what_was_asked_for(stub, checkpoint):
    info = await stub.GetBackendInfo(sampler_pb2.SamplerServiceGetBackendInfoRequest())
    assert info.base_model.fingerprint == checkpoint.fingerprint
    assert info.base_model.dtype == tensors.dtype_from_name(device.dtype_name())
    assert info.device == device.name
    assert info.base_model.max_sequence_length == 2048
    assert (info.max_rank, info.max_loras, info.keep_versions, info.max_sequences) == (64, 4, 2, 64)
    assert (info.active_requests, info.active_sequences) == (0, 0)
    assert "torch" in info.versions


async def test_greedy_base_tokens_are_hugging_faces(stub, base, tokenizer, checkpoint):
    prompt = tokenizer.encode(STORY)
    expected = base.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :].tolist()
    ((served_by, ids, text, _, finish),) = await generate(stub, temperature=0, max_tokens=24)
    await assert_greedy_alike(stub, prompt, ids, expected)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert finish == sampler_pb2.FINISH_REASON_LENGTH
    assert (served_by.adapter_id, served_by.version, served_by.digest) == ("", 0, checkpoint.fingerprint)


async def test_base_scores_are_hugging_faces(stub, base, tokenizer):
    prompt = tokenizer.encode(STORY)
    _, ours = await scores(stub, prompt)
    assert np.abs(ours - logprobs(base, prompt)).mean() <= REFERENCE


async def test_a_pushed_adapter_scores_like_peft(stub, base, tokenizer, smollm2, v1):
    prompt = tokenizer.encode(STORY)
    served_by, ours = await scores(stub, prompt, "anna", 1)
    expected = logprobs(peft_model(smollm2, v1), prompt)
    assert (served_by.adapter_id, served_by.version, served_by.digest) == ("anna", 1, v1.manifest.digest)
    assert np.abs(ours - expected).mean() <= REFERENCE
    assert np.abs(logprobs(base, prompt) - expected).mean() > 0.4


async def test_two_versions_coexist_and_responses_say_which(stub, tokenizer, smollm2, v1, v2):
    prompt = tokenizer.encode(STORY)
    (by_1, first), (by_2, second), (by_latest, latest) = await asyncio.gather(
        scores(stub, prompt, "anna", 1), scores(stub, prompt, "anna", 2), scores(stub, prompt, "anna")
    )
    assert (by_1.version, by_1.digest) == (1, v1.manifest.digest)
    assert (by_2.version, by_2.digest) == (2, v2.manifest.digest)
    assert by_latest == by_2
    assert np.abs(first - logprobs(peft_model(smollm2, v1), prompt)).mean() <= REFERENCE
    assert np.abs(second - logprobs(peft_model(smollm2, v2), prompt)).mean() <= REFERENCE
    np.testing.assert_allclose(latest, second, atol=ROUNDING)


async def test_everyone_in_a_mixed_batch_gets_what_they_get_alone(stub, tokenizer, v1, v2):
    prompt = tokenizer.encode(STORY)
    askers = [("", 0), ("anna", 1), ("anna", 2)]
    alone = [await generate(stub, *asker, temperature=0, max_tokens=16, logprobs=0) for asker in askers]
    together = await asyncio.gather(
        *(generate(stub, *asker, temperature=0, max_tokens=16, logprobs=0) for asker in askers * 2)
    )
    for asker, ((by, tokens, _, positions, _),), ((expected_by, expected, _, expected_positions, _),) in zip(
        askers * 2, together, alone * 2, strict=True
    ):
        assert by == expected_by
        await assert_greedy_alike(stub, prompt, tokens, expected, *asker)
        same = slice(device.first_difference(tokens, expected))
        np.testing.assert_allclose(
            [position.logprob for position in positions[same]],
            [position.logprob for position in expected_positions[same]],
            atol=ROUNDING,
        )
    assert len({tuple(completions[0][1]) for completions in alone}) == 3


async def test_a_request_stays_on_its_version_while_newer_ones_come(channel, stub, tokenizer, checkpoint):
    old = random_adapter(checkpoint, seed=11)
    await push(channel, old, "bert", 1)
    # As many tokens as take longer than the pushes, none of which ends the text.
    sampling = {"temperature": 0, "max_tokens": 40 if device.name == "cpu" else 1500, "logit_bias": {0: -100, 2: -100}}
    ((_, expected, *_),) = await generate(stub, "bert", **sampling)
    request = sampler_pb2.GenerateRequest(
        adapter_id="bert", text=STORY, sampling=sampler_pb2.SamplingParams(**sampling)
    )
    call = aiter(stub.Generate(request))
    responses = [await anext(call)]
    for number in (2, 3, 4):
        await push(channel, random_adapter(checkpoint, seed=10 + number), "bert", number)
    assert (await live(stub))["bert"] == [1, 3, 4]
    async for response in call:
        responses.append(response)
    assert {response.served_by.version for response in responses} == {1}
    assert (await live(stub))["bert"] == [3, 4]
    tokens = [token for response in responses for token in response.tokens]
    await push(channel, old, "bert-alone", 1)
    await assert_greedy_alike(stub, tokenizer.encode(STORY), tokens, expected, "bert-alone")
    await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="bert-alone"))
    unloaded = await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="bert"))
    assert list(unloaded.versions) == [3, 4]
    code, info = await refusal(stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="bert")))
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_ten_versions_come_while_32_streams_run_and_each_stays_on_its_own(channel, stub, tokenizer, checkpoint):
    """Each stream's tokens are those of the same request alone on its version."""
    prompts = [STORY, "The three laws of thermodynamics say that", "To bake bread you need", "In the year 1905,"]
    sampling = sampler_pb2.SamplingParams(temperature=0, max_tokens=16)
    adapters = [random_adapter(checkpoint, seed=50 + number, rank=4) for number in range(10)]

    async def stream(prompt: str) -> tuple[int, str, list[int]]:
        request = sampler_pb2.GenerateRequest(adapter_id="fred", text=prompt, sampling=sampling)
        responses = [response async for response in stub.Generate(request)]
        (version,) = {response.served_by.version for response in responses}
        assert {response.served_by.digest for response in responses} == {adapters[version - 1].manifest.digest}
        return version, prompt, [token for response in responses for token in response.tokens]

    streams = []
    for number, adapter in enumerate(adapters, start=1):
        await push(channel, adapter, "fred", number)
        if number not in (5, 10):  # versions that nobody asks for come too
            streams += [asyncio.create_task(stream(prompt)) for prompt in prompts]
            await asyncio.sleep(0.2)
    results = await asyncio.gather(*streams)
    assert len(results) == 32
    assert len({version for version, _, _ in results}) == 8
    assert (await live(stub))["fred"] == [9, 10]
    await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="fred"))
    for number in sorted({version for version, _, _ in results}):
        await push(channel, adapters[number - 1], "fred-alone", number)
        for version, prompt, tokens in results:
            if version == number:
                ((_, alone, *_),) = await generate(stub, "fred-alone", text=prompt, temperature=0, max_tokens=16)
                await assert_greedy_alike(stub, tokenizer.encode(prompt), tokens, alone, "fred-alone", number)
    await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="fred-alone"))


async def test_a_prepared_version_scores_probes_before_it_is_live(channel, stub, tokenizer, checkpoint):
    tokens, adapter = tokenizer.encode(STORY), random_adapter(checkpoint, seed=41)
    for commits in (False, True):
        stream = client_push.PushStream(channel)
        begin = sampler_pb2.PushBegin(adapter_id="gina", version=1, manifest=adapter.manifest)
        assert await stream.begin(begin) is None
        await stream.send(adapter.payload)
        probed = await stream.prepare([tokens, tokens[:5]])
        assert [len(logprobs) for logprobs in probed] == [len(tokens) - 1, 4]
        assert "gina" not in await live(stub)
        if commits:
            await stream.commit()
        stream.close()
        while not commits:  # the sampler learns of the end a moment later
            _, info = await refusal(pushed(stub, list(push_frames(adapter, "gina", 1))[:1]))
            if info.reason == "PUSH_NOT_COMMITTED":
                break
    _, served = await scores(stub, tokens, "gina")
    np.testing.assert_allclose(probed[0], served, atol=ROUNDING)
    _, of_base = await scores(stub, tokens)
    assert np.abs(served - of_base).mean() > 0.05
    await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="gina"))


async def test_a_version_can_be_read_back_as_it_was_pushed(stub, v2):
    frames = [
        frame async for frame in stub.ExportAdapterVersion(sampler_pb2.ExportAdapterVersionRequest(adapter_id="anna"))
    ]
    assert frames[0].head.version.version == 2
    assert frames[0].head.manifest == v2.manifest
    assert b"".join(frame.chunk.data for frame in frames[1:]) == v2.payload
    code, info = await refusal(stub.ExportAdapterVersion(sampler_pb2.ExportAdapterVersionRequest(adapter_id="nobody")))
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_a_leased_version_is_served_however_many_newer_ones_come(channel, stub, tokenizer, checkpoint):
    tokens = tokenizer.encode(STORY)
    adapters = [random_adapter(checkpoint, seed=60 + number, rank=2) for number in range(4)]
    await push(channel, adapters[0], "hugo", 1)
    _, before = await scores(stub, tokens, "hugo")
    lease = await stub.LeaseVersion(sampler_pb2.LeaseVersionRequest(adapter_id="hugo", ttl_seconds=60))
    for number in (2, 3, 4):
        await push(channel, adapters[number - 1], "hugo", number)
    assert (await live(stub))["hugo"] == [1, 3, 4]
    _, after = await scores(stub, tokens, "hugo", 1)
    np.testing.assert_allclose(after, before, atol=ROUNDING)
    await stub.ReleaseLease(sampler_pb2.ReleaseLeaseRequest(lease_id=lease.lease_id))
    assert (await live(stub))["hugo"] == [3, 4]
    code, info = await refusal(stub.ReleaseLease(sampler_pb2.ReleaseLeaseRequest(lease_id=lease.lease_id)))
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "LEASE_NOT_FOUND")
    await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="hugo"))


async def test_logprobs_are_the_models_own_at_any_temperature(stub, v1):
    ((_, ids, _, positions, _),) = await generate(stub, "anna", 1, temperature=0.5, seed=3, max_tokens=8, logprobs=3)
    ((_, _, _, bare, _),) = await generate(stub, "anna", 1, temperature=0.5, seed=3, max_tokens=8, logprobs=0)
    assert len(positions) == len(ids) == len(bare)
    for token, position, alone in zip(ids, positions, bare, strict=True):
        assert len(position.top) == 3
        assert not alone.top
        assert alone.logprob == pytest.approx(position.logprob, abs=ROUNDING)
        assert [entry.logprob for entry in position.top] == sorted((e.logprob for e in position.top), reverse=True)
        for entry in position.top:
            if entry.token == token:
                assert entry.logprob == position.logprob
    ((*_, none, _),) = await generate(stub, max_tokens=2)
    assert none == []


async def test_logits_are_not_rounded_to_a_16_bit_dtype(stub):
    """Nearly all of the likeliest tokens' are above 4, where bfloat16 has multiples of 1/32."""
    ((_, _, _, positions, _),) = await generate(stub, temperature=0, max_tokens=4, logprobs=5)
    steps = np.diff([[entry.logprob for entry in position.top] for position in positions]) * 32
    assert (np.abs(steps - steps.round()) > 1e-2).mean() > 0.5


async def test_a_seed_repeats_all_completions(stub):
    first = await generate(stub, n=2, seed=7, max_tokens=12)
    second = await generate(stub, n=2, seed=7, max_tokens=12)
    assert [completion[1] for completion in first] == [completion[1] for completion in second]
    assert first[0][1] != first[1][1]


async def test_greedy_completions_are_all_the_greedy_one(stub):
    ((_, expected, *_),) = await generate(stub, temperature=0, max_tokens=8)
    completions = await generate(stub, n=3, temperature=0, max_tokens=8)
    assert [completion[1] for completion in completions] == [expected] * 3


async def test_a_stop_string_ends_the_text_before_it(stub):
    ((_, _, whole, _, _),) = await generate(stub, temperature=0, max_tokens=24)
    word = whole.split()[3]
    ((_, _, text, _, finish),) = await generate(stub, temperature=0, max_tokens=24, stop=[word])
    assert text == whole[: whole.index(word)]
    assert finish == sampler_pb2.FINISH_REASON_STOP


async def test_as_many_tokens_as_a_number_can_say_are_as_many_as_there_is_room_for(stub, tokenizer):
    text = STORY * 169
    room = 2048 - len(tokenizer.encode(text))
    assert 0 < room < 100
    # Always the same token, which ends nothing.
    ((_, ids, *_, finish),) = await generate(stub, text=text, max_tokens=2**32 - 1, logit_bias={42: 100.0})
    assert len(ids) == room
    assert finish == sampler_pb2.FINISH_REASON_LENGTH


async def test_a_stop_token_is_a_completions_last(stub):
    ((_, whole, *_),) = await generate(stub, temperature=0, max_tokens=24)
    ((_, ids, _, _, finish),) = await generate(stub, temperature=0, max_tokens=24, stop_token_ids=[whole[5]])
    assert ids == whole[: whole.index(whole[5]) + 1]
    assert finish == sampler_pb2.FINISH_REASON_STOP


async def test_parameters_change_what_is_sampled_as_they_say(stub):
    ((_, greedy, *_),) = await generate(stub, temperature=0, max_tokens=12)
    ((_, biased, *_),) = await generate(stub, temperature=0, max_tokens=12, logit_bias={greedy[0]: -100.0, 42: 100.0})
    assert set(biased) == {42}
    ((_, likeliest, *_),) = await generate(stub, min_p=1.0, max_tokens=12)
    assert likeliest == greedy
    close = {42: 40.0, 43: 39.5}
    ((_, repeating, *_),) = await generate(stub, temperature=0, max_tokens=12, logit_bias=close)
    assert set(repeating) == {42}
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 2.0}):
        ((_, ids, *_),) = await generate(stub, temperature=0, max_tokens=12, logit_bias=close, **penalty)
        assert ids[:2] == [42, 43], penalty


async def test_prompt_logprobs_are_the_scores_and_come_once(stub, tokenizer, v1):
    tokens = tokenizer.encode(STORY)
    request = sampler_pb2.GenerateRequest(
        adapter_id="anna",
        version=1,
        tokens=Tokens(tokens=tokens),
        sampling=sampler_pb2.SamplingParams(n=2, max_tokens=3, prompt_logprobs=2),
    )
    responses = [response async for response in stub.Generate(request)]
    positions = responses[0].prompt_logprobs
    assert not any(response.prompt_logprobs for response in responses[1:])
    assert all(len(position.top) == 2 for position in positions)
    _, expected = await scores(stub, tokens, "anna", 1)
    assert [position.logprob for position in positions] == pytest.approx(expected.tolist(), abs=ROUNDING)


async def test_a_structure_is_kept_to(stub):
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    schema |= {"additionalProperties": False}
    ((_, _, text, _, finish),) = await generate(stub, temperature=0, max_tokens=64, json_schema=json.dumps(schema))
    assert finish == sampler_pb2.FINISH_REASON_STOP
    assert isinstance(json.loads(text)["age"], int)
    choice = sampler_pb2.Choice(options=["umbrella", "zebra crossing"])
    ((_, _, text, *_),) = await generate(stub, temperature=0, choice=choice)
    assert text in choice.options
    ((_, _, text, *_),) = await generate(stub, temperature=0, regex="[A-C]{3}-[0-9]{2}")
    assert re.fullmatch("[A-C]{3}-[0-9]{2}", text)
    ((_, _, text, *_),) = await generate(stub, temperature=0, grammar='root ::= "ab" | "cd"')
    assert text in ("ab", "cd")


async def test_a_chat_is_laid_out_by_the_template(stub, tokenizer):
    messages = [{"role": "user", "content": "Say hello."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    sampling = sampler_pb2.SamplingParams(temperature=0, max_tokens=8)
    chat = sampler_pb2.Chat(messages=[sampler_pb2.ChatMessage(**message) for message in messages])
    answers = []
    for prompt in ({"chat": chat}, {"tokens": Tokens(tokens=ids)}):
        call = stub.Generate(sampler_pb2.GenerateRequest(sampling=sampling, **prompt))
        answers.append([(list(response.tokens), response.prompt_tokens) async for response in call])
    assert answers[0] == answers[1]
    assert answers[0][0][1] == len(ids)


async def test_cancelling_stops_the_work(stub, v1):
    call = stub.Generate(
        sampler_pb2.GenerateRequest(adapter_id="anna", text=STORY, sampling=sampler_pb2.SamplingParams(n=4))
    )
    await call.read()
    assert await active(stub) == (1, 4)
    call.cancel()
    await until_idle(stub)


async def test_a_deadline_that_passes_stops_the_work(stub, v1):
    endless = sampler_pb2.GenerateRequest(
        adapter_id="anna", text=STORY, sampling=sampler_pb2.SamplingParams(n=2, logit_bias={0: -100.0, 2: -100.0})
    )
    for call in (
        stub.Generate(endless, timeout=2),
        stub.GenerateBatch(sampler_pb2.GenerateBatchRequest(requests=[endless, endless]), timeout=2),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until_idle(stub)
    assert not any(version.active_requests for version in await versions(stub, "anna"))


async def batch(stub, *requests: sampler_pb2.GenerateRequest) -> list[sampler_pb2.GenerateBatchResponse]:
    call = stub.GenerateBatch(sampler_pb2.GenerateBatchRequest(requests=requests))
    return [response async for response in call]


async def test_a_batch_gives_what_single_requests_give(stub, tokenizer, v1, v2):
    prompt = tokenizer.encode(STORY)
    askers = [("", 0, 12), ("anna", 1, 12), ("anna", 0, 3)]
    params = {"temperature": 0, "logprobs": 1, "n": 2, "prompt_logprobs": 0}
    results = await batch(
        stub,
        *(
            sampler_pb2.GenerateRequest(
                adapter_id=adapter_id,
                version=version,
                text=STORY,
                sampling=sampler_pb2.SamplingParams(max_tokens=max_tokens, **params),
            )
            for adapter_id, version, max_tokens in askers
        ),
    )
    assert results[0].index == 2, "the shortest one is whole first"
    for result in results:
        adapter_id, version, max_tokens = askers[result.index]
        alone = await generate(stub, adapter_id, version, max_tokens=max_tokens, **params)
        assert result.prompt_tokens == len(result.prompt_logprobs) + 1
        for completion, (served_by, ids, text, positions, finish) in zip(result.completions, alone, strict=True):
            assert (result.served_by, completion.finish_reason) == (served_by, finish)
            await assert_greedy_alike(stub, prompt, completion.tokens, ids, adapter_id, version)
            same = slice(device.first_difference(completion.tokens, ids))
            assert completion.text == (tokenizer.decode(completion.tokens) if same.stop is not None else text)
            assert [position.logprob for position in completion.logprobs[same]] == pytest.approx(
                [position.logprob for position in positions[same]], abs=ROUNDING
            )
    assert sorted(result.index for result in results) == [0, 1, 2]
    assert await active(stub) == (0, 0)


async def test_a_batch_stops_where_single_requests_stop(stub):
    ((_, ids, text, *_),) = await generate(stub, temperature=0, max_tokens=24)
    for stop in ({"stop": [text.split()[3]]}, {"stop_token_ids": [ids[5]]}):
        sampling = {"temperature": 0, "max_tokens": 24} | stop
        ((_, *alone, finish),) = await generate(stub, **sampling)
        (result,) = await batch(
            stub, sampler_pb2.GenerateRequest(text=STORY, sampling=sampler_pb2.SamplingParams(**sampling))
        )
        (completion,) = result.completions
        assert [list(completion.tokens), completion.text, list(completion.logprobs)] == alone
        assert completion.finish_reason == finish == sampler_pb2.FINISH_REASON_STOP


async def test_one_bad_request_keeps_the_whole_batch_out(stub, v2):
    fine = sampler_pb2.GenerateRequest(**PROMPT)
    for bad, reason, field in (
        (sampled(regex="("), "STRUCTURE_INVALID", "requests[1].sampling.regex"),
        (PROMPT | {"adapter_id": "anna", "version": 99}, "VERSION_NOT_FOUND", "requests[1]"),
    ):
        call = stub.GenerateBatch(sampler_pb2.GenerateBatchRequest(requests=[fine, sampler_pb2.GenerateRequest(**bad)]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        details = rpc_status.from_call(caught.value).details
        assert details[0].Unpack(info)
        assert details[1].Unpack(bad_request)
        assert (info.reason, bad_request.field_violations[0].field) == (reason, field)
    assert await active(stub) == (0, 0)


async def test_cancelling_a_batch_stops_all_of_it(stub, v1):
    request = sampler_pb2.GenerateRequest(adapter_id="anna", text=STORY, sampling=sampler_pb2.SamplingParams(n=3))
    quick = sampler_pb2.GenerateRequest(text=STORY, sampling=sampler_pb2.SamplingParams(max_tokens=1))
    call = stub.GenerateBatch(sampler_pb2.GenerateBatchRequest(requests=[request, request, quick]))
    assert (await call.read()).index == 2
    assert await active(stub) == (3, 7)
    call.cancel()
    await until_idle(stub)


async def test_a_full_sampler_turns_away_and_says_when_to_come_back(stub):
    request = sampler_pb2.GenerateRequest(text=STORY, sampling=sampler_pb2.SamplingParams(n=40))
    call = stub.Generate(request)
    await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request).read()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    details = rpc_status.from_call(caught.value).details
    assert details[0].Unpack(info)
    assert details[1].Unpack(retry)
    assert (caught.value.code(), info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SAMPLER_FULL")
    assert dict(info.metadata) == {"sequences": "40", "active_sequences": "40", "max_sequences": "64"}
    assert retry.retry_delay.seconds == 1
    await generate(stub, max_tokens=1)
    call.cancel()
    await until_idle(stub)
    await generate(stub, n=40, max_tokens=1)


async def test_logprobs_are_the_models_own_whatever_changes_its_choice(stub, tokenizer):
    prompt = tokenizer.encode(STORY)
    changes = {"logit_bias": {42: 9.0}, "presence_penalty": 1.5, "repetition_penalty": 1.7, "min_p": 0.1, "top_p": 0.9}
    ((_, ids, _, positions, _),) = await generate(stub, seed=5, max_tokens=8, logprobs=0, **changes)
    _, whole = await scores(stub, [*prompt, *ids])
    expected = pytest.approx(whole[len(prompt) - 1 :].tolist(), abs=ROUNDING)
    assert [position.logprob for position in positions] == expected
    # What a structure forbids is the one thing that is taken out before: one token is left here.
    ((_, ids, text, positions, _),) = await generate(stub, logprobs=0, regex="Q")
    _, whole = await scores(stub, [*prompt, *ids])
    assert text == "Q"
    assert positions[0].logprob == pytest.approx(0, abs=1e-5)
    assert whole[len(prompt) - 1] < -5


GENERATE, SCORE, UNLOAD = "Generate", "ComputeLogprobs", "UnloadAdapter"
PROMPT = {"tokens": Tokens(tokens=[1, 2, 3])}


def sampled(**sampling):
    return PROMPT | {"sampling": sampler_pb2.SamplingParams(**sampling)}


def chat(role: str):
    return {"chat": sampler_pb2.Chat(messages=[sampler_pb2.ChatMessage(role=role, content="Hi")])}


@pytest.mark.parametrize(
    ("method", "request_fields", "code", "reason"),
    [
        (GENERATE, PROMPT | {"adapter_id": "nobody"}, "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        (GENERATE, PROMPT | {"adapter_id": "anna", "version": 99}, "NOT_FOUND", "VERSION_NOT_FOUND"),
        (GENERATE, PROMPT | {"version": 1}, "INVALID_ARGUMENT", "VERSION_WITHOUT_ADAPTER"),
        (GENERATE, {}, "INVALID_ARGUMENT", "PROMPT_EMPTY"),
        (GENERATE, {"tokens": Tokens()}, "INVALID_ARGUMENT", "PROMPT_EMPTY"),
        (GENERATE, {"text": ""}, "INVALID_ARGUMENT", "PROMPT_EMPTY"),
        (GENERATE, {"chat": sampler_pb2.Chat()}, "INVALID_ARGUMENT", "PROMPT_EMPTY"),
        (GENERATE, chat("wizard"), "INVALID_ARGUMENT", "CHAT_ROLE_UNKNOWN"),
        (GENERATE, {"tokens": Tokens(tokens=[1, 49152])}, "INVALID_ARGUMENT", "TOKEN_OUT_OF_RANGE"),
        (GENERATE, {"tokens": Tokens(tokens=[-1])}, "INVALID_ARGUMENT", "TOKEN_OUT_OF_RANGE"),
        (GENERATE, {"tokens": Tokens(tokens=[1] * 2048)}, "INVALID_ARGUMENT", "SEQUENCE_TOO_LONG"),
        (GENERATE, sampled(n=0), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(n=129), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(max_tokens=0), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(temperature=-0.1), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(temperature=float("nan")), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(temperature=float("inf")), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(top_p=0), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(top_p=1.1), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(logprobs=21), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(stop=[""]), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(stop_token_ids=[49152]), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(min_p=1.5), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(repetition_penalty=0), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(presence_penalty=float("nan")), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(frequency_penalty=-3), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(logit_bias={-1: 1.0}), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(logit_bias={1: float("inf")}), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(prompt_logprobs=21), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(choice=sampler_pb2.Choice()), "INVALID_ARGUMENT", "SAMPLING_INVALID"),
        (GENERATE, sampled(json_schema="{"), "INVALID_ARGUMENT", "STRUCTURE_INVALID"),
        (GENERATE, sampled(json_schema='{"type": "wizard"}'), "INVALID_ARGUMENT", "STRUCTURE_INVALID"),
        (GENERATE, sampled(json_schema="[]"), "INVALID_ARGUMENT", "STRUCTURE_INVALID"),
        (GENERATE, sampled(json_schema='{"a":' * 33 + "{}" + "}" * 33), "INVALID_ARGUMENT", "STRUCTURE_INVALID"),
        (GENERATE, sampled(json_schema="[" * 100_000), "INVALID_ARGUMENT", "STRUCTURE_INVALID"),
        (
            GENERATE,
            sampled(json_schema='{"type": "integer", "multipleOf": 3}'),
            "INVALID_ARGUMENT",
            "STRUCTURE_INVALID",
        ),
        (GENERATE, sampled(regex="a" * 65_537), "INVALID_ARGUMENT", "STRUCTURE_INVALID"),
        (GENERATE, sampled(regex="("), "INVALID_ARGUMENT", "STRUCTURE_INVALID"),
        (GENERATE, sampled(grammar="root ::="), "INVALID_ARGUMENT", "STRUCTURE_INVALID"),
        (SCORE, {}, "INVALID_ARGUMENT", "PROMPT_EMPTY"),
        (SCORE, {"sequences": [Tokens(tokens=[1])]}, "INVALID_ARGUMENT", "SEQUENCE_TOO_SHORT"),
        (
            SCORE,
            {"sequences": [Tokens(tokens=[1, 2]), Tokens(tokens=[1, 49152])]},
            "INVALID_ARGUMENT",
            "TOKEN_OUT_OF_RANGE",
        ),
        (SCORE, {"sequences": [Tokens(tokens=[1, 2])], "adapter_id": "nobody"}, "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        (UNLOAD, {"adapter_id": "anna", "version": 99}, "NOT_FOUND", "VERSION_NOT_FOUND"),
    ],
)
async def test_a_bad_request_is_refused_before_the_engine(stub, v2, method, request_fields, code, reason):
    request = getattr(sampler_pb2, f"{method}Request")(**request_fields)
    refused_with, info = await refusal(getattr(stub, method)(request))
    assert (refused_with.name, info.reason) == (code, reason)


async def test_a_refusal_names_what_there_is(stub, v2):
    request = sampler_pb2.GenerateRequest(adapter_id="anna", version=99, **PROMPT)
    _, info = await refusal(stub.Generate(request))
    assert info.metadata["versions"] == "1,2"
    request = sampler_pb2.GenerateRequest(tokens=Tokens(tokens=[5, 49152]))
    _, info = await refusal(stub.Generate(request))
    assert (info.metadata["index"], info.metadata["token"]) == ("1", "49152")


async def test_the_same_digest_again_moves_no_bytes(stub, v2):
    for number in (2, 3):
        call = stub.PushAdapter()
        await call.write(next(push_frames(v2, "anna", number)))
        answer = (await call.read()).committed
        assert answer.already_live
        assert (answer.version.version, answer.version.digest) == (2, v2.manifest.digest)


async def test_a_version_never_changes(stub, v1, v2):
    code, info = await refusal(pushed(stub, push_frames(v1, "anna", 2)))
    assert (code, info.reason) == (grpc.StatusCode.ALREADY_EXISTS, "VERSION_EXISTS")
    assert info.metadata["latest_version"] == "2"


async def cancelled(stub, address, adapter):
    call = stub.PushAdapter()
    for frame in islice(push_frames(adapter, "carl", 1), 3):
        await call.write(frame)
    await call.read()
    call.cancel()


async def half_closed(stub, address, adapter):
    frames = list(push_frames(adapter, "carl", 1))
    code, info = await refusal(pushed(stub, frames[:-1]))
    assert (code, info.reason) == (grpc.StatusCode.ABORTED, "PUSH_NOT_COMMITTED")


async def past_its_deadline(stub, address, adapter):
    call = stub.PushAdapter(timeout=1)
    with pytest.raises(grpc.aio.AioRpcError):
        await call.write(next(push_frames(adapter, "carl", 1)))
        await call.read()
        await call.read()
    assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def flipped_byte(stub, address, adapter):
    frames = list(push_frames(adapter, "carl", 1))
    data = bytearray(frames[1].chunk.data)
    data[1000] ^= 1
    frames[1].chunk.data = bytes(data)
    code, info = await refusal(pushed(stub, frames))
    assert (code, info.reason) == (grpc.StatusCode.DATA_LOSS, "PAYLOAD_DAMAGED")


async def killed(stub, address, adapter):
    """A client process that has sent half an adapter and then is no more."""
    program = """
import sys, time, grpc
from tinkerbell.v1 import sampler_pb2, sampler_pb2_grpc

def frames():
    while size := int.from_bytes(sys.stdin.buffer.read(4)):
        yield sampler_pb2.PushAdapterRequest.FromString(sys.stdin.buffer.read(size))
    print("sent", flush=True)
    time.sleep(600)

stub = sampler_pb2_grpc.SamplerServiceStub(grpc.insecure_channel(sys.argv[1]))
list(stub.PushAdapter(frames()))
"""
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, address, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for frame in islice(push_frames(adapter, "carl", 1), 5):
        client.stdin.write(frame.ByteSize().to_bytes(4) + frame.SerializeToString())
    client.stdin.write(bytes(4))
    await client.stdin.drain()
    assert await client.stdout.readline() == b"sent\n"
    client.kill()
    await client.wait()


@pytest.mark.parametrize("interrupted", [cancelled, half_closed, past_its_deadline, flipped_byte, killed])
async def test_a_push_cut_off_installs_nothing_and_the_next_one_succeeds(
    channel, stub, sampler_process, checkpoint, v2, interrupted
):
    adapter = random_adapter(checkpoint, seed=21)
    await interrupted(stub, sampler_process.address, adapter)
    assert "carl" not in await live(stub)
    for _ in range(50):  # the sampler learns of a cut connection a moment later
        try:
            committed = await push(channel, adapter, "carl", 1)
            break
        except errors.TinkerbellError as busy:
            assert busy.reason == "PUSH_IN_PROGRESS"
            await asyncio.sleep(0.1)
    assert committed.version.digest == adapter.manifest.digest
    assert not committed.already_live
    await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="carl"))


async def test_numbers_that_are_not_finite_stay_outside(stub, checkpoint):
    adapter = random_adapter(checkpoint, seed=22)
    name = list(adapter.tensors)[7]
    adapter.tensors[name][0, 0] = np.nan
    poisoned = Adapter.of(adapter.tensors, adapter.manifest.lora, checkpoint.fingerprint)
    code, info = await refusal(pushed(stub, push_frames(poisoned, "dora", 1)))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "TENSOR_NOT_FINITE")
    assert info.metadata["tensor"] == name
    assert "dora" not in await live(stub)


async def test_a_second_push_of_an_adapter_is_turned_away(stub, checkpoint):
    adapter = random_adapter(checkpoint, seed=23)
    first = stub.PushAdapter()
    await first.write(next(push_frames(adapter, "emil", 1)))
    await first.read()
    code, info = await refusal(pushed(stub, push_frames(adapter, "emil", 1)))
    assert (code, info.reason) == (grpc.StatusCode.ABORTED, "PUSH_IN_PROGRESS")
    first.cancel()


async def test_more_adapters_than_slots_all_keep_their_numbers(
    channel, stub, sampler_metrics_address, tokenizer, checkpoint
):
    """Beyond max_loras, 4 here, vLLM evicts adapters and loads them again, from the workers' stores."""
    prompt, reloads = tokenizer.encode(STORY), "tinkerbell_sampler_adapter_reloads_total"
    reloaded = metric(sampler_metrics_address, reloads)
    names = [f"slot{index}" for index in range(64)]

    async def score(name: str) -> np.ndarray:
        request = sampler_pb2.ComputeLogprobsRequest(adapter_id=name, sequences=[Tokens(tokens=prompt)])
        return tensors.decode((await stub.ComputeLogprobs(request)).logprobs[0])

    before = {}
    for index, name in enumerate(names):
        await push(channel, random_adapter(checkpoint, seed=30 + index, rank=2), name, 1)
        before[name] = await score(name)
    after = await asyncio.gather(*map(score, names))
    for name, again in zip(names, after, strict=True):
        np.testing.assert_allclose(again, before[name], atol=ROUNDING)
        await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id=name))
    assert len({tuple(numbers) for numbers in before.values()}) == 64
    await asyncio.sleep(3)  # counted every 2 s
    assert metric(sampler_metrics_address, reloads) - reloaded >= 60


async def test_the_prefix_cache_serves_one_version_and_never_another(
    channel, stub, sampler_metrics_address, checkpoint
):
    """A prompt is computed anew for each version, and not again for the same one."""
    text = " ".join(f"The {number}th house is painted in a colour of its own." for number in range(12))
    adapter = random_adapter(checkpoint, seed=71, rank=2)

    async def hits(version: int) -> float:
        before = metric(sampler_metrics_address, "vllm:prefix_cache_hits_total")
        await generate(stub, "ida", version, text=text, temperature=0, max_tokens=1)
        return metric(sampler_metrics_address, "vllm:prefix_cache_hits_total") - before

    await push(channel, adapter, "ida", 1)
    assert await hits(1) == 0
    assert await hits(1) > 0
    await push(channel, random_adapter(checkpoint, seed=72, rank=2), "ida", 2)
    assert await hits(2) == 0
    assert await hits(1) > 0  # the new version has flushed nothing
    assert await hits(2) > 0
    await stub.UnloadAdapter(sampler_pb2.UnloadAdapterRequest(adapter_id="ida"))


async def test_reflection_lists_the_service(sampler_process):
    async with grpc.aio.insecure_channel(sampler_process.address) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in reflection.ServerReflectionInfo(iter([request])):
            names = [service.name for service in response.list_services_response.service]
    assert "tinkerbell.v1.SamplerService" in names
    assert "grpc.health.v1.Health" in names


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert alive == []


async def test_sigterm_lets_running_calls_finish_and_leaves_no_process(tiny_model):
    sampler = start_sampler(tiny_model, "--kv-cache-gib", "0.1")
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(sampler.process.kill)
        async with grpc.aio.insecure_channel(sampler.address) as channel:
            stub = sampler_pb2_grpc.SamplerServiceStub(channel)
            await channel.channel_ready()
            code, info = await refusal(stub.ListAdapters(sampler_pb2.ListAdaptersRequest()))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOADING")
            await asyncio.to_thread(wait_ready, sampler)
            # A model without a tokenizer takes token ids, and nothing that needs text.
            for needs_text in ({"text": "Hi"}, chat("user"), sampled(stop=["x"])):
                code, info = await refusal(stub.Generate(sampler_pb2.GenerateRequest(**needs_text)))
                assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_TOKENIZER")
            call = aiter(stub.Generate(sampler_pb2.GenerateRequest(**sampled(n=4, seed=1, max_tokens=200))))
            first = await anext(call)
            started = family(sampler.process)
            assert "VLLM::EngineCore" in [process.name() for process in started]
            sampler.process.terminate()
            finished = [response.finish_reason async for response in call if response.finish_reason]
            assert len(finished) + bool(first.finish_reason) == 4
        assert await asyncio.to_thread(sampler.process.wait, 60) == 0
        assert_gone(started)


async def test_sigterm_while_loading_leaves_no_process(tiny_model):
    sampler = start_sampler(tiny_model, "--kv-cache-gib", "0.1")
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(sampler.process.kill)
        for _ in range(1200):
            started = family(sampler.process)
            if len(started) >= 2:  # vLLM's core and Python's resource tracker
                break
            await asyncio.sleep(0.1)
        sampler.process.terminate()
        assert await asyncio.to_thread(sampler.process.wait, 60) == 0
        assert_gone(started)
