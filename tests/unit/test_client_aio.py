import asyncio
import inspect

import numpy as np
import pytest
from client_fakes import WEIGHTS, Fakes

import tinkerbell
from tinkerbell import AsyncSamplerClient, AsyncTrainerClient, Datum

DATA = [Datum([1, 2, 3], [2, 3, 4])]


@pytest.fixture
def fakes():
    with Fakes().running() as running:
        yield running


async def test_run_over_asyncio(fakes):
    stages = []
    async with AsyncTrainerClient(fakes.trainer_address) as trainer:
        await trainer.initialize_base_model("tiny", on_progress=lambda step: stages.append(step.stage))
        run = await trainer.create_lora_adapter("alice")
        loss, step, sync = run.forward_backward(DATA), run.optim_step(learning_rate=1e-3), run.sync_adapter_to_vllm()
        exported = await run.export_adapter_weights(as_dict=True)
        pairs = [pair async for pair in trainer.export_adapter_weights("alice")]
        assert (await loss).loss == 2.5
        assert (await step).step == 2
        assert (await sync).version == 7
    assert stages == ["building", "ready"]
    assert list(exported) == [name for name, _ in pairs] == list(WEIGHTS)
    assert sorted(fakes.trainer.seq_ids()) == [0, 1, 2, 3, 4]


async def test_cancelled_operations_still_happen(fakes):
    async with AsyncTrainerClient(fakes.trainer_address) as trainer:
        run = await trainer.create_lora_adapter("alice")
        run.forward_backward(DATA).cancel()
        run.export_adapter_weights()
        assert (await run.optim_step()).step == 3
        async with asyncio.timeout(5):  # the fake does not put them in order, so this one may overtake the others
            while len(fakes.trainer.requests) < 3:  # noqa: ASYNC110 - the fake lives on another loop
                await asyncio.sleep(0.01)
    assert sorted(fakes.trainer.seq_ids()) == [1, 2, 3]


async def test_sampler_over_asyncio(fakes):
    async with AsyncSamplerClient(fakes.sampler_address) as sampler:
        results = await asyncio.gather(*(sampler.generate(f"a {number}") for number in range(10)))
        assert [result.text for result in results] == [f"a {number} " for number in range(10)]
        assert [delta.text async for delta in sampler.stream([3, 4])] == ["3 ", "4 "]
        assert [result.text for result in await sampler.generate_batch(["a", "b"])] == ["a!", "b!"]
        assert (await sampler.compute_logprobs([[1, 2]])).logprobs[0].shape == (1,)
        pushed = await sampler.push_adapter("alice", 1, WEIGHTS, rank=8, alpha=16)
        assert not pushed.already_live
        assert await sampler.unload_adapter("alice", 1) == [1]


async def test_cancelling_a_stream_stops_the_work(fakes):
    fakes.sampler.endless = True
    async with AsyncSamplerClient(fakes.sampler_address) as sampler:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sampler.generate("go"), 0.1)
        assert await asyncio.to_thread(fakes.sampler.cancelled.wait, 5)


def test_clients_are_made_in_a_coroutine():
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncTrainerClient("localhost:1")


@pytest.mark.parametrize(
    ("asynchronous", "blocking"),
    [
        (tinkerbell.AsyncTrainerClient, tinkerbell.TrainerClient),
        (tinkerbell.AsyncTrainingRun, tinkerbell.TrainingRun),
        (tinkerbell.AsyncSamplerClient, tinkerbell.SamplerClient),
    ],
)
def test_both_faces_have_the_same_methods(asynchronous, blocking):
    def signatures(face):
        return {
            name: [
                (parameter.name, parameter.kind, parameter.default, str(parameter.annotation))
                for parameter in inspect.signature(member).parameters.values()
            ]
            if callable(member)
            else type(member)
            for name, member in vars(face).items()
            if not name.startswith("_")
        }

    assert signatures(asynchronous) == signatures(blocking)


def test_everything_exported_exists_and_is_documented():
    for name in tinkerbell.__all__:
        assert inspect.getdoc(getattr(tinkerbell, name)), name
    assert issubclass(tinkerbell.DataLossError, tinkerbell.TinkerbellError)
    assert np.isclose(tinkerbell.AdamParams().learning_rate, 1e-4)
