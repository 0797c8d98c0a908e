"""The examples, at reduced size, on real engines."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples import concurrent_tenants, dpo, rl_grpo, sft, weight_streaming
from tinkerbell import SampledAdapter, SamplerClient

pytestmark = pytest.mark.engine


@pytest.fixture
def options(trainer_process, sampler_process, tmp_path: Path) -> dict:
    """What every example takes."""
    return {
        "trainer_address": trainer_process.address,
        "sampler_address": sampler_process.address,
        "out": tmp_path,
    }


@pytest.fixture
def sampler(sampler_process) -> Iterator[SamplerClient]:
    """Without what an example has left there, in the end."""
    with SamplerClient(sampler_process.address) as client:
        before = {adapter.adapter_id for adapter in client.list_adapters()}
        yield client
        for adapter in client.list_adapters():
            if adapter.adapter_id not in before:
                client.unload_adapter(adapter.adapter_id)


def published(sampler: SamplerClient, name: str) -> SampledAdapter:
    """The one adapter of that example."""
    (adapter,) = [known for known in sampler.list_adapters() if known.adapter_id.startswith(f"{name}-")]
    return adapter


def assert_drawn(file: Path) -> None:
    assert file.read_bytes().startswith(b"\x89PNG")


def test_sft_learns_and_publishes(options: dict, sampler: SamplerClient) -> None:
    losses = sft.main(**options, steps=10)
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert published(sampler, "sft").latest_version == 1
    assert_drawn(options["out"] / "loss.png")


def test_grpo_samples_each_step_from_the_weights_of_the_step_before(options: dict, sampler: SamplerClient) -> None:
    rewards = rl_grpo.main(**options, steps=3)
    assert len(rewards) == 3
    assert all(0 < reward < 1 for reward in rewards)
    assert published(sampler, "grpo").latest_version == 4  # that of before the first step among them
    assert_drawn(options["out"] / "reward.png")


def test_dpo_moves_away_from_the_reference_towards_what_was_chosen(options: dict, sampler: SamplerClient) -> None:
    margins = dpo.main(**options, steps=8)
    assert len(margins) == 8
    assert margins[0] == pytest.approx(0, abs=0.005)  # the policy is the reference
    assert margins[-1] > 0.05
    assert [live.version for live in published(sampler, "dpo").versions] == [1, 2]
    assert_drawn(options["out"] / "dpo.png")


def test_concurrent_tenants_learn_what_they_learn_alone(options: dict) -> None:
    alone, together = concurrent_tenants.main(**options, steps=4)
    assert np.shape(alone) == (len(concurrent_tenants.TENANTS), 4)
    np.testing.assert_allclose(together, alone, rtol=0.01)
    assert all(losses[-1] < losses[0] for losses in together)
    assert_drawn(options["out"] / "loss.png")


def test_weight_streaming_measures_both_ways(options: dict, sampler: SamplerClient) -> None:
    seconds = weight_streaming.main(**options, rounds=2)
    assert {way: len(rounds) for way, rounds in seconds.items()} == {"in memory": 2, "by disk": 2}
    versions = [adapter.latest_version for adapter in sampler.list_adapters() if "streaming-" in adapter.adapter_id]
    assert versions == [3, 3]  # with the round that warms up
    assert list(options["out"].iterdir()) == []  # the folders are gone
