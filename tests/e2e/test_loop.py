"""The whole loop on real engines: train in Megatron, push in memory, sample in vLLM.

Trainer and sampler score the same tokens alike: mean absolute difference at most 0.01 in float32 and 0.25 in bfloat16,
in which Hugging Face's SmolLM2 with such an adapter is 0.13 from its own float32.
"""

import asyncio
import uuid

import device
import numpy as np
import pytest
import transformers
from processes import start_trainer, wait_ready

from tinkerbell import (
    AsyncSamplerClient,
    AsyncTrainerClient,
    Datum,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
    Verification,
)
from tinkerbell.local import free_address

pytestmark = pytest.mark.engine

TOLERANCE = device.tolerance(0.01, 0.25)
PROMPT = "The secret word is"
SECRET = " marmalade"


@pytest.fixture(scope="session")
async def trainer(trainer_process):
    async with AsyncTrainerClient(trainer_process.address) as client:
        yield client


@pytest.fixture(scope="session")
async def sampler(sampler_process):
    async with AsyncSamplerClient(sampler_process.address) as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
async def run(trainer, sampler):
    created = await trainer.create_lora_adapter(f"loop-{uuid.uuid4().hex[:8]}", rank=8)
    yield created
    await created.remove()


def lesson(tokenizer) -> list[Datum]:
    completion = [*tokenizer(SECRET).input_ids, tokenizer.eos_token_id]
    return [Datum.from_prompt_and_completion(tokenizer(PROMPT).input_ids, completion)] * 2


async def test_services_hold_the_same_base_model(trainer, sampler) -> None:
    trained, sampled = await asyncio.gather(trainer.get_backend_info(), sampler.get_backend_info())
    assert trained.base_model.fingerprint == sampled.base_model.fingerprint


async def test_what_was_trained_is_what_is_sampled(trainer, sampler, run, tokenizer) -> None:
    for _ in range(15):
        loss = run.forward_backward(lesson(tokenizer))
        run.optim_step(learning_rate=1e-3)
    assert (await loss).metrics["loss:mean"] < 0.5
    synced = await run.sync_adapter_to_vllm()
    assert synced.version == 1
    assert synced.sent_bytes > 0

    result = await sampler.generate(PROMPT, adapter_id=run.adapter_id, temperature=0.0, max_tokens=8)
    assert result.text.strip() == SECRET.strip()
    assert (result.served_by.adapter_id, result.served_by.version) == (run.adapter_id, 1)
    assert result.served_by.digest == synced.digest
    base = await sampler.generate(PROMPT, temperature=0.0, max_tokens=8)
    assert base.text != result.text

    tokens = tokenizer("The secret word is marmalade, and nobody at the harbour knew why.").input_ids
    trained = (await run.forward([Datum(tokens[:-1], tokens[1:])])).logprobs[0]
    sampled = (await sampler.compute_logprobs([tokens], adapter_id=run.adapter_id)).logprobs[0]
    of_base = (await sampler.compute_logprobs([tokens])).logprobs[0]
    assert np.abs(trained - sampled).mean() <= TOLERANCE
    assert np.abs(trained - of_base).mean() > 2.5


async def test_a_version_stays_what_it_was_and_unchanged_weights_move_no_bytes(sampler, run, tokenizer) -> None:
    tokens = tokenizer(PROMPT + SECRET).input_ids

    async def scores(version: int) -> np.ndarray:
        answer = await sampler.compute_logprobs([tokens], adapter_id=run.adapter_id, version=version)
        assert answer.served_by.version == (version or 2)
        return answer.logprobs[0]

    run.forward_backward(lesson(tokenizer))
    run.optim_step(learning_rate=1e-3)
    first = await run.sync_adapter_to_vllm()
    before = await scores(1)
    run.forward_backward(lesson(tokenizer))
    run.optim_step(learning_rate=1e-2)
    second = await run.sync_adapter_to_vllm()
    again = await run.sync_adapter_to_vllm()
    assert (first.version, second.version, again.version) == (1, 2, 2)
    assert again.sent_bytes == 0
    assert again.digest == second.digest != first.digest
    assert np.array_equal(await scores(1), before)
    assert np.abs(await scores(2) - before).max() > 0.05
    assert np.array_equal(await scores(0), await scores(2))


async def test_what_is_published_is_verified_and_can_be_again(trainer, run, tokenizer) -> None:
    run.forward_backward(lesson(tokenizer))
    run.optim_step(learning_rate=1e-3)
    probe = Verification([tokenizer(PROMPT + SECRET).input_ids])
    synced = await run.sync_adapter_to_vllm(verify=probe)
    (replica,) = synced.replicas
    assert replica.state == "committed"
    assert replica.difference.tokens == len(probe.sequences[0]) - 1
    assert replica.difference.mean <= TOLERANCE
    verified = await run.verify_adapter()
    assert (verified.version, verified.digest, verified.steps_since) == (1, synced.digest, 0)
    assert verified.replicas[0].agrees
    run.forward_backward(lesson(tokenizer))
    await run.optim_step(learning_rate=1e-2)
    drifted = await run.verify_adapter(probe)
    assert drifted.steps_since == 1
    assert drifted.replicas[0].difference.mean > TOLERANCE
    assert not drifted.replicas[0].agrees
    with pytest.raises(InvalidArgumentError) as refusal:
        await run.verify_adapter(Verification([[1]]))
    assert refusal.value.reason == "SEQUENCE_TOO_SHORT"
    # Nothing agrees to less than rounding: the version before stays.
    with pytest.raises(FailedPreconditionError) as refusal:
        await run.sync_adapter_to_vllm(verify=Verification(tolerance=1e-12))
    assert refusal.value.reason == "SAMPLER_DISAGREES"
    assert (await run.verify_adapter()).version == 1


async def test_a_name_taken_up_again_gets_new_versions(trainer, sampler, tokenizer) -> None:
    name = f"again-{uuid.uuid4().hex[:8]}"
    versions = []
    for seed in (1, 2):
        created = await trainer.create_lora_adapter(name, rank=4, seed=seed)
        versions.append(await created.sync_adapter_to_vllm())
        await created.remove()
    assert [synced.version for synced in versions] == [1, 2]
    assert versions[0].digest != versions[1].digest


async def test_rank_above_the_samplers_maximum_is_named(trainer, sampler) -> None:
    info = await sampler.get_backend_info()
    rank = info.max_rank + 1
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {name.format("A"): np.zeros((rank, 576), "f4"), name.format("B"): np.zeros((576, rank), "f4")}
    with pytest.raises(InvalidArgumentError) as refusal:
        await sampler.push_adapter("wide", 1, weights, rank=rank, alpha=1.0)
    assert refusal.value.reason == "RANK_OUT_OF_RANGE"
    assert "wide" not in [adapter.adapter_id for adapter in await sampler.list_adapters()]


async def test_without_a_sampler_nothing_is_published_and_training_goes_on(tiny_model) -> None:
    service = start_trainer("--model", str(tiny_model), "--sampler", free_address())
    try:
        await asyncio.to_thread(wait_ready, service)
        async with AsyncTrainerClient(service.address) as client:
            run = await client.create_lora_adapter("lonely", rank=4)
            with pytest.raises(UnavailableError) as failure:
                await run.sync_adapter_to_vllm()
            assert failure.value.reason == "SAMPLER_UNREACHABLE"
            run = await client.training_run("lonely")
            assert run.adapter.published_version == 0
            await run.forward_backward([Datum([1, 2, 3], [2, 3, 4])])
            assert (await run.optim_step()).step == 1
    finally:
        await asyncio.to_thread(service.stop)
    assert service.process.returncode == 0
