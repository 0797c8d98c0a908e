"""The sampler's room for sequences, and batches, on an engine whose completions end when a test says so."""

import asyncio
import contextlib
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sampler_service.config import SamplerConfig
from sampler_service.lanes import Lanes
from sampler_service.requests import Delta, Finish, Request, Sampling, Structure, TokenPrompt, structure_invalid
from sampler_service.sampler import Sampler
from sampler_service.tokenizer import Tokenizer
from sampler_service.versions import Version
from service_common.checkpoint import Checkpoint
from service_common.errors import Code, ServiceError
from tinkerbell.v1 import common_pb2

LIMIT = 4


class FakeEngine:
    """Completes prompt [t] with the tokens t, t + 1; the second comes once `release(t)` was called.

    Deltas are the same for whole completions: whoever adds them up does not mind.
    """

    def __init__(self):
        self.info = SimpleNamespace(device="cpu", dtype=common_pb2.DATA_TYPE_FLOAT32, max_model_len=16)
        self.running, self.dropped = [], []
        self.released = {}

    def release(self, *tokens):
        for token in tokens:
            self.released.setdefault(token, asyncio.Event()).set()

    async def install(self, version, memory_id):
        raise NotImplementedError

    open_device_memory = close_device_memory = install

    def drop(self, version):
        self.dropped.append(version.version)

    def check_structure(self, structure):
        raise structure_invalid(structure, "no")

    async def generate(self, prompt, sampling, version, *, whole=False):
        (token,) = prompt
        self.running.append(token)
        try:
            for index in range(sampling.n):
                yield Delta(index, [token], "a", [], None)
            await self.released.setdefault(token, asyncio.Event()).wait()
            if token == 13:
                raise ServiceError(Code.UNAVAILABLE, "COMPLETION_ABORTED", "unlucky")
            for index in range(sampling.n):
                yield Delta(index, [token + 1], "b", [], Finish.STOP)
        finally:
            self.running.remove(token)

    async def score(self, tokens, version):
        await self.released.setdefault(tokens[0], asyncio.Event()).wait()
        return np.zeros(len(tokens) - 1, np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    config = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 32, "max_position_embeddings": 16}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(32, 8)}, folder / "model.safetensors")
    return Checkpoint("toy", folder)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def sampler(checkpoint, engine) -> Sampler:
    config = SamplerConfig(
        model="toy",
        dtype="auto",
        tensor_parallel=1,
        max_rank=8,
        max_loras=2,
        keep_versions=1,
        max_sequences=LIMIT,
        max_model_len=16,
        kv_cache_bytes=0,
        gpu_memory_utilization=None,
        cuda_ipc=False,
        await_trainer=False,
    )
    return Sampler(config, checkpoint, engine, Tokenizer(checkpoint.folder), Lanes("127.0.0.1", 0))


def publish(sampler, number: int) -> None:
    lora = common_pb2.LoraConfig(rank=1)
    manifest = common_pb2.AdapterManifest(lora=lora, digest=f"digest{number}")
    sampler.registry.publish(Version("anna", number, manifest, None, lora, b""))


def ask(token: int, adapter_id: str = "", version: int = 0, **sampling) -> Request:
    return Request(adapter_id, version, TokenPrompt([token]), Sampling(**sampling))


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def batch(sampler, *requests):
    """The batch's results as a list that grows while it runs, and its task."""
    results = []

    async def run():
        async with contextlib.aclosing(sampler.generate_batch(requests)) as whole:
            async for result in whole:
                results.append(result)

    task = asyncio.create_task(run())
    try:
        yield results, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def refused(call) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await call
    return caught.value


async def drained(generator):
    return [result async for result in generator]


async def test_results_come_as_they_are_whole(sampler, engine):
    async with batch(sampler, ask(1, n=2), ask(2)) as (results, task):
        await until(lambda: engine.running == [1, 2])
        assert not results
        engine.release(2)
        await until(lambda: results)
        assert [result.index for result in results] == [1]
        engine.release(1)
        await task
    assert [result.index for result in results] == [1, 0]
    assert [(each.tokens, each.text, each.finish) for each in results[1].completions] == [
        ([1, 2], "ab", Finish.STOP)
    ] * 2
    assert (results[0].served_by, results[0].prompt_tokens) == (None, 1)
    assert (sampler.active_sequences, sampler.active_requests) == (0, 0)


async def test_a_batch_is_on_the_versions_of_one_moment(sampler, engine):
    publish(sampler, 1)
    async with batch(sampler, ask(1, "anna"), ask(2, "anna")) as (results, task):
        await until(lambda: engine.running)
        publish(sampler, 2)
        engine.release(1, 2)
        assert engine.dropped == []
        await task
    assert [result.served_by.version for result in results] == [1, 1]
    assert engine.dropped == [1]


@pytest.mark.parametrize(
    ("bad", "reason", "field"),
    [
        (ask(40), "TOKEN_OUT_OF_RANGE", "requests[1].prompt"),
        (ask(1, temperature=-1), "SAMPLING_INVALID", "requests[1].sampling.temperature"),
        (ask(1, logit_bias=dict.fromkeys(range(1025), 1.0)), "SAMPLING_INVALID", "requests[1].sampling.logit_bias"),
        (ask(1, stop_token_ids=[1] * 129), "SAMPLING_INVALID", "requests[1].sampling.stop_token_ids"),
        (ask(1, structure=Structure("regex", "(")), "NO_TOKENIZER", "requests[1]"),
        (ask(1, "nobody"), "ADAPTER_NOT_FOUND", "requests[1]"),
        (ask(1, version=3), "VERSION_WITHOUT_ADAPTER", "requests[1].version"),
    ],
)
async def test_one_bad_request_keeps_the_whole_batch_out(sampler, engine, bad, reason, field):
    error = await refused(drained(sampler.generate_batch([ask(1), bad])))
    assert (error.reason, error.field) == (reason, field)
    assert error.message.startswith("requests[1]: ")
    assert (engine.running, sampler.active_sequences, sampler.active_requests) == ([], 0, 0)


async def test_an_empty_batch_is_refused(sampler):
    assert (await refused(drained(sampler.generate_batch([])))).reason == "BATCH_EMPTY"


async def test_one_that_fails_ends_the_others(sampler, engine):
    publish(sampler, 1)
    async with batch(sampler, ask(1, "anna"), ask(13, "anna")) as (results, task):
        await until(lambda: engine.running == [1, 13])
        engine.release(13)
        assert (await refused(task)).reason == "COMPLETION_ABORTED"
    assert (results, engine.running, sampler.active_sequences) == ([], [], 0)
    assert sampler.registry.adapters()["anna"][0].active_requests == 0


async def test_a_cancelled_batch_frees_everything(sampler, engine):
    publish(sampler, 1)
    async with batch(sampler, ask(1, "anna"), ask(2, n=3)) as (_, task):
        await until(lambda: engine.running == [1, 2])
        assert (sampler.active_sequences, sampler.active_requests) == (4, 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert (engine.running, sampler.active_sequences, sampler.active_requests) == ([], 0, 0)
    assert sampler.registry.adapters()["anna"][0].active_requests == 0


async def test_a_full_sampler_says_when_to_come_back(sampler, engine):
    async with sampler.generate(ask(1, n=3)) as generation:
        await anext(generation.deltas)
        for call in (
            drained(sampler.generate_batch([ask(2), ask(3)])),
            sampler.compute_logprobs("", 0, [[1, 2], [3, 4]]),
            sampler.generate(ask(2, n=2)).__aenter__(),
        ):
            error = await refused(call)
            assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "SAMPLER_FULL")
            assert error.metadata == {"sequences": "2", "active_sequences": "3", "max_sequences": "4"}
            assert error.retry_seconds == 1
        engine.release(2)
        assert len(await drained(sampler.generate_batch([ask(2)]))) == 1
    engine.release(3)
    assert len(await drained(sampler.generate_batch([ask(2), ask(3, n=3)]))) == 2


async def test_what_can_never_run_is_not_asked_to_wait(sampler):
    for call in (
        drained(sampler.generate_batch([ask(1, n=3), ask(2, n=2)])),
        sampler.compute_logprobs("", 0, [[1, 2]] * 5),
        sampler.generate(ask(1, n=5)).__aenter__(),
    ):
        error = await refused(call)
        assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "TOO_MANY_SEQUENCES")
        assert error.retry_seconds is None


async def test_a_structure_is_checked_before_anything_runs(sampler, engine):
    sampler._tokenizer.present = True
    request = dataclasses.replace(ask(1), sampling=Sampling(structure=Structure("regex", "(")))
    error = await refused(drained(sampler.generate_batch([ask(2), request])))
    assert (error.reason, error.field) == ("STRUCTURE_INVALID", "requests[1].sampling.regex")
    assert engine.running == []
