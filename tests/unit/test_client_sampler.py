import numpy as np
import pytest
from client_fakes import FINGERPRINT, LORA, WEIGHTS, Fakes

import tinkerbell
from tinkerbell import SamplerClient, SamplingParams, adapter, push
from tinkerbell.payload import CHUNK_BYTES
from tinkerbell.v1 import sampler_pb2


@pytest.fixture
def fakes():
    with Fakes().running() as running:
        yield running


@pytest.fixture
def sampler(fakes):
    with SamplerClient(fakes.sampler_address, timeout=10) as client:
        yield client


def test_generate_puts_the_completions_together(fakes, sampler):
    result = sampler.generate("a b c", SamplingParams(n=2, stop="."), adapter_id="alice", version=3, seed=5).result()
    assert [completion.text for completion in result.completions] == ["a b c ", "a b c "]
    assert result.completions[1].tokens == (0, 1, 2)
    assert [position.logprob for position in result.completions[0].logprobs] == [-0.5] * 3
    assert result.completions[0].finish_reason == "stop"
    assert (result.served_by.adapter_id, result.served_by.version, result.prompt_tokens) == ("alice", 3, 3)
    sampling = fakes.sampler.generate_requests[0].sampling
    assert (sampling.n, sampling.seed, sampling.stop) == (2, 5, ["."])
    assert not sampling.HasField("max_tokens")
    assert not sampling.HasField("logprobs")


@pytest.mark.parametrize(
    ("structure", "kind", "value"),
    [
        ({"json_schema": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"json_schema": "{}"}, "json_schema", "{}"),
        ({"regex": "a*"}, "regex", "a*"),
        ({"choice": ["a", "b"]}, "choice", sampler_pb2.Choice(options=["a", "b"])),
        ({"grammar": "root ::= a"}, "grammar", "root ::= a"),
    ],
)
def test_structures_of_every_kind(fakes, sampler, structure, kind, value):
    sampler.generate("a", **structure, logit_bias={7: -1.5}, stop_token_ids=[3]).result()
    sampling = fakes.sampler.generate_requests[0].sampling
    assert sampling.WhichOneof("structure") == kind
    assert getattr(sampling, kind) == value
    assert (dict(sampling.logit_bias), list(sampling.stop_token_ids)) == ({7: -1.5}, [3])


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("text", "text"),
        ([1, 2], "tokens"),
        (np.array([1, 2]), "tokens"),
        ([{"role": "user", "content": "hi"}], "chat"),
    ],
)
def test_prompts_of_every_kind(fakes, sampler, prompt, kind):
    sampler.generate(prompt).result()
    assert fakes.sampler.generate_requests[0].WhichOneof("prompt") == kind


def test_bad_arguments_are_refused_before_anything_is_sent(fakes, sampler):
    with pytest.raises(TypeError):
        sampler.generate("hi", heat=2)
    with pytest.raises(ValueError, match="one of json_schema, regex, choice and grammar"):
        sampler.generate("hi", regex="a", choice=["b"])
    with pytest.raises(ValueError, match="token ids are integers"):
        sampler.generate([0.5])
    with pytest.raises(ValueError, match="sequence 1"):
        sampler.compute_logprobs([[1, 2], [[3]]])
    assert not fakes.sampler.generate_requests


def test_many_prompts_at_once(sampler):
    futures = [sampler.generate(f"prompt {number}") for number in range(30)]
    assert [future.result().text for future in futures] == [f"prompt {number} " for number in range(30)]


def test_a_batch_is_in_the_order_of_its_prompts(fakes, sampler):
    results = sampler.generate_batch(["a", "b", "c"], SamplingParams(n=2), adapter_id="alice", temperature=0).result()
    assert [result.text for result in results] == ["a!", "b!", "c!"]
    assert [result.completions[1].tokens for result in results] == [(0, 7), (1, 7), (2, 7)]
    assert [position.logprob for position in results[0].completions[0].logprobs] == [-0.5] * 2
    assert (results[0].completions[0].finish_reason, results[0].prompt_tokens) == ("length", 5)
    assert (results[0].served_by.version, results[0].prompt_logprobs[0].logprob) == (3, -1)
    assert {(each.adapter_id, each.sampling.temperature) for each in fakes.sampler.generate_requests} == {("alice", 0)}


def test_a_batch_that_ends_early_is_an_error(fakes, sampler):
    fakes.sampler.cut_batch = True
    with pytest.raises(tinkerbell.InternalError, match="1 of 2 results"):
        sampler.generate_batch(["a", "b"]).result()


def test_a_full_sampler_says_when_to_come_back(sampler):
    with pytest.raises(tinkerbell.ResourceExhaustedError) as caught:
        sampler.generate_batch(["a"] * 9).result()
    assert (caught.value.reason, caught.value.retry_seconds) == ("SAMPLER_FULL", 1.25)
    assert caught.value.metadata == {"max_sequences": "8"}
    with pytest.raises(tinkerbell.FailedPreconditionError) as caught:
        sampler.push_adapter("alice", 2, WEIGHTS, rank=8, alpha=16, base_model_fingerprint="0" * 64)
    assert caught.value.retry_seconds is None


def test_leaving_a_stream_cancels_the_work(fakes, sampler):
    fakes.sampler.endless = True
    for delta in sampler.stream("go"):
        assert delta.text == "on "
        break
    assert fakes.sampler.cancelled.wait(5)


def test_cancelling_a_generate_cancels_the_work(fakes, sampler):
    fakes.sampler.endless = True
    future = sampler.generate("go")
    while not fakes.sampler.generate_requests:
        pass
    assert future.cancel()
    assert fakes.sampler.cancelled.wait(5)


def test_compute_logprobs(sampler):
    result = sampler.compute_logprobs([[1, 2, 3], np.array([4, 5])], adapter_id="alice").result()
    assert [scores.tolist() for scores in result.logprobs] == [[-1, -1], [-1]]
    assert result.served_by.adapter_id == "alice"


def test_push_installs_what_was_given_and_is_a_success_twice(fakes, sampler):
    first = sampler.push_adapter("alice", 1, WEIGHTS, rank=8, alpha=16)
    assert not first.already_live
    manifest, payload = fakes.sampler.pushed["alice", 1]
    assert first.version.digest == manifest.digest
    assert manifest.lora.target_modules == ["up_proj"]
    assert manifest.base_model_fingerprint == FINGERPRINT
    assert payload == b"".join(array.tobytes() for array in WEIGHTS.values())
    assert fakes.sampler.chunks == -(-len(payload) // CHUNK_BYTES)
    again = sampler.push_adapter("alice", 1, WEIGHTS, rank=8, alpha=16)
    assert again.already_live
    assert fakes.sampler.chunks == -(-len(payload) // CHUNK_BYTES)
    assert [(sampled.adapter_id, sampled.latest_version) for sampled in sampler.list_adapters()] == [("alice", 1)]
    assert sampler.unload_adapter("alice") == [1]


def test_leases(sampler):
    lease = sampler.lease_version("alice", ttl_seconds=30)
    assert (lease.lease_id, lease.version.adapter_id, lease.version.version) == ("for 30 s", "alice", 9)
    assert sampler.lease_version("alice", 9, ttl_seconds=30, lease_id=lease.lease_id).lease_id == lease.lease_id
    with pytest.raises(tinkerbell.NotFoundError):
        sampler.release_lease("another")


def test_refused_pushes_are_typed(sampler):
    sampler.push_adapter("alice", 1, WEIGHTS, rank=8, alpha=16)
    with pytest.raises(tinkerbell.AlreadyExistsError) as caught:
        sampler.push_adapter("alice", 1, WEIGHTS, rank=8, alpha=17)
    assert caught.value.metadata == {"version": "1"}
    with pytest.raises(tinkerbell.FailedPreconditionError):
        sampler.push_adapter("alice", 2, WEIGHTS, rank=8, alpha=16, base_model_fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"'up_proj\.lora_A' is not base_model\.model\.PATH"):
        sampler.push_adapter("alice", 2, {"up_proj.lora_A": np.ones((8, 4), np.float32)}, rank=8, alpha=16)


async def test_push_with_a_damaged_payload_leaves_nothing(fakes):
    manifest, payload = adapter.pack(WEIGHTS, LORA, FINGERPRINT)
    begin = sampler_pb2.PushBegin(adapter_id="alice", version=1, manifest=manifest)
    async with tinkerbell.AsyncSamplerClient(fakes.sampler_address) as client:
        channel = client._connection.channel
        for _ in range(30):  # the sampler ends the call while a chunk is being written, which grpc.aio takes badly
            with pytest.raises(tinkerbell.DataLossError) as caught:
                await push.push(channel, begin, payload * 4)
            assert caught.value.reason == "PAYLOAD_DAMAGED"
        assert not fakes.sampler.pushed
        committed = await push.push(channel, begin, memoryview(payload), timeout=10)
    assert committed.version.version == 1
    assert fakes.sampler.pushed["alice", 1][1] == payload


def test_info(sampler):
    info = sampler.get_backend_info()
    assert info.base_model.fingerprint == FINGERPRINT
    assert info.versions == {"vllm": "0.26.0"}
