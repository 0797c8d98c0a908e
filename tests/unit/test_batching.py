"""Calls of many adapters in shared passes: who waits for whom, and what each gets."""

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service_common import errors
from service_common.errors import ServiceError
from trainer_service.batch import Datum, num_tokens
from trainer_service.batching import Batcher, Computed
from trainer_service.commands import Commands
from trainer_service.engine import Engine
from trainer_service.losses import Loss, LossConfig
from trainer_service.metrics import Metrics
from trainer_service.passes import Part, PartResult

WINDOW = 0.003


class RecordingExecutor:
    """Stands for an engine: keeps each pass and answers with the data's own tokens as log-probabilities."""

    def __init__(self) -> None:
        self.passes: list[list[Part]] = []
        self.started: list[float] = []
        self.refused: set[str] = set()
        self.failure: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.seconds = 0.0

    async def run(self, method: Callable, *args, **_) -> list[PartResult]:
        assert method is Engine.run_pass
        (parts,) = args
        self.passes.append(list(parts))
        self.started.append(time.monotonic())
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        return [self._result(part) for part in parts]

    def close(self) -> None:
        pass

    def tokens(self, index: int) -> dict[str, int]:
        """Of one pass, by adapter."""
        return {
            adapter_id: sum(num_tokens(part.data) for part in self.passes[index] if part.adapter_id == adapter_id)
            for adapter_id in {part.adapter_id for part in self.passes[index]}
        }

    def _result(self, part: Part) -> PartResult:
        refusal = None
        if part.adapter_id in self.refused:
            refusal = errors.failed_precondition("LOSS_NOT_FINITE", "the loss is nan")
        logprobs = [datum.tokens.astype(np.float32) for datum in part.data]
        return PartResult(logprobs, {"loss": 2.0 * len(part.data), "tokens": float(num_tokens(part.data))}, refusal)


class Calls:
    """Makes calls through a batcher."""

    def __init__(self, budget: int = 100):
        self.executor = RecordingExecutor()
        self.metrics = Metrics()
        self.batcher = Batcher(Commands(self.executor), self.metrics, budget, WINDOW)

    def start(self, adapter_id: str, *lengths: int, backward: bool = True) -> "asyncio.Task[Computed]":
        data = [Datum(np.full(length, length), np.zeros(length, np.int64), {}) for length in lengths]
        return asyncio.create_task(self.batcher.compute(adapter_id, data, Loss.CROSS_ENTROPY, LossConfig(), backward))

    async def blocked(self) -> "asyncio.Task[Computed]":
        """A call whose pass is under way until `executor.gate` opens, so that others queue behind it."""
        self.executor.gate = asyncio.Event()
        first = self.start("first", 1)
        while not self.executor.passes:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return first

    def metric(self, name: str, **labels: str) -> float | None:
        registry: CollectorRegistry = self.metrics.registry
        return registry.get_sample_value(f"tinkerbell_trainer_{name}", labels)


async def outcomes(calls: Sequence[asyncio.Task]) -> list:
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)


async def test_calls_of_different_adapters_share_a_pass_and_each_gets_its_own() -> None:
    calls = Calls()
    results = await outcomes([calls.start("a", 3, 2), calls.start("b", 5), calls.start("", 7, backward=False)])
    (parts,) = calls.executor.passes
    assert [(part.adapter_id, part.backward, part.is_last) for part in parts] == [
        ("a", True, True),
        ("b", True, True),
        ("", False, True),
    ]
    assert [[len(logprobs) for logprobs in result.logprobs] for result in results] == [[3, 2], [5], [7]]
    assert [result.metrics["tokens:sum"] for result in results] == [5, 5, 7]


async def test_a_lone_call_waits_for_the_window_and_no_longer() -> None:
    calls = Calls()
    began = time.monotonic()
    await calls.start("a", 3)
    assert WINDOW <= calls.executor.started[0] - began < WINDOW + 0.1


async def test_a_full_pass_does_not_wait_for_the_window() -> None:
    calls = Calls(budget=10)
    calls.batcher._window_seconds = 60.0
    await asyncio.wait_for(calls.start("a", 10), 5)


async def test_calls_that_come_during_a_pass_go_together_in_the_next() -> None:
    calls = Calls()
    first = await calls.blocked()
    later = [calls.start(name, 4) for name in "abc"]
    await asyncio.sleep(0)
    calls.executor.gate.set()
    await outcomes([first, *later])
    assert [set(calls.executor.tokens(index)) for index in range(2)] == [{"first"}, {"a", "b", "c"}]


async def test_no_pass_exceeds_its_budget_but_for_one_long_sequence() -> None:
    calls = Calls(budget=20)
    rng = np.random.default_rng(0)
    tasks = [calls.start(name, *rng.integers(1, 35, 12)) for name in "abcd"]
    await outcomes(tasks)
    for parts in calls.executor.passes:
        count = sum(len(part.data) for part in parts)
        assert count == 1 or sum(num_tokens(part.data) for part in parts) <= 20
    assert sum(len(part.data) for parts in calls.executor.passes for part in parts) == 48


async def test_a_call_larger_than_a_pass_is_cut_and_put_together() -> None:
    calls = Calls(budget=10)
    result = await calls.start("a", 6, 4, 5, 3, 25, 1)
    parts = [part for parts in calls.executor.passes for part in parts]
    assert [[len(datum) for datum in part.data] for part in parts] == [[6, 4], [5, 3], [25], [1]]
    assert [part.is_last for part in parts] == [False, False, False, True]
    assert [len(logprobs) for logprobs in result.logprobs] == [6, 4, 5, 3, 25, 1]
    assert result.metrics == {"loss:sum": 12.0, "tokens:sum": 44.0}


async def test_gradient_calls_of_one_adapter_never_share_a_pass_and_forwards_do() -> None:
    calls = Calls()
    first = await calls.blocked()
    kinds = [True, True, False, False, True]
    mine = [calls.start("a", length, backward=kind) for length, kind in zip((1, 2, 3, 4, 5), kinds, strict=True)]
    await asyncio.sleep(0)
    calls.executor.gate.set()
    await outcomes([first, *mine])
    passes = [[(num_tokens(part.data), part.backward) for part in parts] for parts in calls.executor.passes[1:]]
    assert passes == [[(1, True)], [(2, True)], [(3, False), (4, False)], [(5, True)]]


async def test_a_long_queue_delays_its_owner_and_nobody_else() -> None:
    calls = Calls(budget=100)
    first = await calls.blocked()
    huge = [calls.start("huge", *[10] * 100) for _ in range(10)]
    await asyncio.sleep(0)
    small = calls.start("small", *[10] * 5)
    await asyncio.sleep(0)
    calls.executor.gate.set()
    await small
    assert calls.executor.tokens(1) == {"huge": 50, "small": 50}
    await outcomes([first, *huge])


async def test_shares_are_equal_in_tokens_not_in_sequences() -> None:
    calls = Calls(budget=120)
    first = await calls.blocked()
    tasks = [calls.start("long", *[40] * 60), calls.start("short", *[4] * 600)]
    await asyncio.sleep(0)
    calls.executor.gate.set()
    await outcomes([first, *tasks])
    had = {"long": 0, "short": 0}
    for index in range(1, 31):
        for adapter_id, tokens in calls.executor.tokens(index).items():
            had[adapter_id] += tokens
        assert abs(had["long"] - had["short"]) <= 40


async def test_whoever_did_not_queue_has_saved_nothing_up() -> None:
    calls = Calls(budget=100)
    await calls.start("late", 1)
    first = await calls.blocked()
    busy = calls.start("busy", *[10] * 60)
    await asyncio.sleep(0)
    calls.executor.seconds = 0.005
    calls.executor.gate.set()
    while len(calls.executor.passes) < 5:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    late = calls.start("late", *[10] * 30)
    await outcomes([first, busy, late])
    shared = [calls.executor.tokens(index) for index in range(len(calls.executor.passes))]
    assert {"busy": 50, "late": 50} in shared
    # "busy" is served in every pass until it has all it wants.
    ends = max(index for index, tokens in enumerate(shared) if "busy" in tokens)
    begins = min(index for index, tokens in enumerate(shared) if "busy" in tokens)
    assert all("busy" in tokens for tokens in shared[begins : ends + 1])


async def test_a_refusal_fails_that_call_alone_and_at_once() -> None:
    calls = Calls(budget=10)
    calls.executor.refused = {"bad"}
    bad, good = await outcomes([calls.start("bad", *[5] * 20), calls.start("good", *[5] * 4)])
    assert isinstance(bad, ServiceError)
    assert bad.reason == "LOSS_NOT_FINITE"
    assert good.metrics["tokens:sum"] == 20
    assert sum(part.adapter_id == "bad" for parts in calls.executor.passes for part in parts) == 1
    assert calls.batcher._queues == {}


@pytest.mark.parametrize("failure", [ValueError("boom"), errors.unavailable("GONE", "away", tokens=3)])
async def test_a_pass_that_fails_fails_its_calls_each_with_an_exception_of_its_own(failure: Exception) -> None:
    calls = Calls()
    calls.executor.failure = failure
    first, second = await outcomes([calls.start("a", 3), calls.start("b", 3)])
    assert first is not second
    for error in (first, second):
        if isinstance(failure, ServiceError):
            assert (error.reason, error.message, error.metadata) == ("GONE", "away", {"tokens": "3"})
        else:
            assert "boom" in str(error)
            assert error.__cause__ is failure
    assert calls.batcher._queues == {}
    calls.executor.failure = None
    assert (await calls.start("a", 3)).metrics["tokens:sum"] == 3


async def test_a_call_that_fails_midway_takes_no_further_passes() -> None:
    calls = Calls(budget=10)
    first = await calls.blocked()
    long = calls.start("a", *[10] * 4)
    await asyncio.sleep(0)
    calls.executor.failure = ValueError("boom")
    calls.executor.gate.set()
    await outcomes([first, long])
    assert len(calls.executor.passes) == 2
    assert calls.batcher._queues == {}


async def test_metrics_count_passes_tenants_and_tokens() -> None:
    calls = Calls(budget=10)
    await outcomes([calls.start("a", 4, 4), calls.start("b", 2), calls.start("", 6, backward=False)])
    assert calls.metric("pass_tokens_sum") == 16
    assert calls.metric("pass_tenants_count") == len(calls.executor.passes) == 2
    assert calls.metric("queue_seconds_count") == 3
    assert calls.metric("tokens_total", operation="forward_backward") == 10
    assert calls.metric("tokens_total", operation="forward") == 6
