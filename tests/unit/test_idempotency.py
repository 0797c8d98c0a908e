"""Repeated requests."""

import asyncio
import gc
from collections.abc import Callable

import pytest

from service_common import errors
from service_common.errors import Code, ServiceError
from tinkerbell.v1 import trainer_pb2
from tinkerbell.v1.trainer_pb2 import OptimStepResponse
from trainer_service.idempotency import Answers, Reply, body
from trainer_service.order import Turns


class Steps:
    """Counts how often it is done; holds each time until `release` is set."""

    def __init__(self, error: Exception | None = None, held: bool = False):
        self.done = 0
        self.error = error
        self.release = asyncio.Event()
        if not held:
            self.release.set()

    async def __call__(self) -> OptimStepResponse:
        await self.release.wait()
        self.done += 1
        if self.error is not None:
            raise self.error
        return OptimStepResponse(step=self.done, grad_norm=0.1)


async def call(answers: Answers, request_id: str, work: Callable, content: bytes = b"x") -> asyncio.Task:
    task = asyncio.create_task(answers.once(request_id, content, work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_a_repeated_request_gets_the_first_answer() -> None:
    answers, steps = Answers(), Steps()
    first = await answers.once("r", b"x", steps)
    assert await answers.once("r", b"x", steps) == first == OptimStepResponse(step=1, grad_norm=0.1)
    assert steps.done == 1


async def test_a_repeated_request_gets_the_first_error() -> None:
    answers = Answers()
    steps = Steps(errors.invalid_argument("LOSS_UNKNOWN", "loss is 99", field="loss", loss=99))
    for _ in range(2):
        with pytest.raises(ServiceError) as refusal:
            await answers.once("r", b"x", steps)
        error = refusal.value
        assert (error.code, error.reason, error.message) == (Code.INVALID_ARGUMENT, "LOSS_UNKNOWN", "loss is 99")
        assert (error.field, error.metadata) == ("loss", {"loss": "99"})
    assert steps.done == 1


async def test_calls_during_the_first_share_its_answer() -> None:
    answers, steps = Answers(), Steps(held=True)
    calls = [await call(answers, "r", steps) for _ in range(3)]
    steps.release.set()
    assert [response.step for response in await asyncio.gather(*calls)] == [1, 1, 1]


async def test_calls_during_the_first_share_its_error() -> None:
    answers, steps = Answers(), Steps(errors.unavailable("SAMPLER_FAILED", "gone"), held=True)
    calls = [await call(answers, "r", steps) for _ in range(3)]
    steps.release.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [error.reason for error in results] == ["SAMPLER_FAILED"] * 3
    assert steps.done == 1


async def test_work_goes_on_when_its_callers_are_cancelled_and_the_retry_gets_its_answer() -> None:
    answers, steps = Answers(), Steps(held=True)
    for caller in [await call(answers, "r", steps) for _ in range(2)]:
        caller.cancel()
        await asyncio.sleep(0)
        assert caller.cancelled()
    gc.collect()  # nothing but Answers refers to the work now
    retry = await call(answers, "r", steps)
    steps.release.set()
    assert (await retry).step == 1
    assert (await answers.once("r", b"x", steps)).step == 1
    assert steps.done == 1


async def test_work_without_an_id_goes_on_too_and_nothing_of_it_is_kept() -> None:
    answers, steps = Answers(), Steps(held=True)
    first = await call(answers, "", steps)
    first.cancel()
    second = await call(answers, "", steps, b"y")
    steps.release.set()
    await answers.wait_idle()
    assert steps.done == 2
    assert second.done()
    assert answers.saved() == []


async def test_the_same_id_with_another_body_is_refused_during_and_after_the_first() -> None:
    answers, steps = Answers(), Steps(held=True)
    first = await call(answers, "r", steps)
    for _ in range(2):
        with pytest.raises(ServiceError) as refusal:
            await answers.once("r", b"y", steps)
        assert (refusal.value.code, refusal.value.reason) == (Code.FAILED_PRECONDITION, "REQUEST_ID_REUSED")
        steps.release.set()
        await first
    assert steps.done == 1


async def test_bodies_of_two_types_differ_also_when_their_bytes_do_not() -> None:
    remove = trainer_pb2.RemoveLoraAdapterRequest(adapter_id="a", request_id="r")
    delete = trainer_pb2.DeleteCheckpointRequest(checkpoint_id="a", request_id="r")
    assert remove.SerializeToString() == delete.SerializeToString()
    assert body(remove) != body(delete)
    assert body(remove) == body(trainer_pb2.RemoveLoraAdapterRequest.FromString(remove.SerializeToString()))


async def test_an_unexpected_exception_reaches_all_who_wait_and_is_not_kept() -> None:
    answers, steps = Answers(), Steps(ZeroDivisionError(), held=True)
    calls = [await call(answers, "r", steps) for _ in range(2)]
    steps.release.set()
    assert all(isinstance(e, ZeroDivisionError) for e in await asyncio.gather(*calls, return_exceptions=True))
    steps.error = None
    assert (await answers.once("r", b"x", steps)).step == 2


async def test_an_operation_refused_before_its_turn_may_come_again() -> None:
    answers, turns, steps = Answers(), Turns("alice", gap_seconds=0.01), Steps()

    async def second() -> OptimStepResponse:
        async with turns.take(2):
            return await steps()

    with pytest.raises(ServiceError, match="operation 1"):
        await answers.once("r2", b"x", second)
    async with turns.take(1):
        pass
    assert (await answers.once("r2", b"x", second)).step == 1


async def test_the_oldest_finished_answers_are_forgotten_and_never_a_running_one() -> None:
    answers, held, steps = Answers(limit=2), Steps(held=True), Steps()
    running = await call(answers, "running", held)
    for name in "abc":
        await answers.once(name, b"x", steps)
    assert [reply.request_id for reply in answers.saved()] == ["b", "c"]
    retry = await call(answers, "running", held)
    held.release.set()
    assert await running == await retry
    assert held.done == 1
    assert [reply.request_id for reply in answers.saved()] == ["c", "running"]
    assert (await answers.once("a", b"x", steps)).step == 4


async def test_256_answers_are_kept() -> None:
    answers, steps = Answers(), Steps()
    for number in range(257):
        await answers.once(str(number), b"x", steps)
    assert [int(reply.request_id) for reply in answers.saved()] == list(range(1, 257))


async def test_restored_answers_are_given_again() -> None:
    answers, steps = Answers(), Steps()
    response = await answers.once("good", b"x", steps)
    failing = Steps(errors.failed_precondition("NO_GRADIENT", "no gradient", adapter_id="alice"))
    with pytest.raises(ServiceError):
        await answers.once("bad", b"y", failing)
    saved = answers.saved()
    assert [reply.method for reply in saved] == ["tinkerbell.v1.OptimStepResponse", ""]
    assert all(isinstance(reply, Reply) and len(reply.body_digest) == 64 for reply in saved)

    restored = Answers(saved, limit=2)
    assert restored.saved() == saved
    again = await restored.once("good", b"x", steps)
    assert type(again) is OptimStepResponse
    assert again == response
    with pytest.raises(ServiceError) as refusal:
        await restored.once("bad", b"y", failing)
    assert (refusal.value.reason, refusal.value.metadata) == ("NO_GRADIENT", {"adapter_id": "alice"})
    with pytest.raises(ServiceError, match="another request"):
        await restored.once("good", b"y", steps)
    assert (steps.done, failing.done) == (1, 1)
    await restored.once("new", b"x", steps)
    assert [reply.request_id for reply in restored.saved()] == ["bad", "new"]


async def test_an_answer_is_kept_before_the_next_operation_of_the_adapter_begins() -> None:
    """Else a checkpoint that the next operation takes would have the work, and not the answer."""
    answers, turns, steps = Answers(), Turns("alice"), Steps()
    kept: list[str] = []

    async def first() -> OptimStepResponse:
        async with turns.take(1):
            return await steps()

    async def second() -> OptimStepResponse:
        async with turns.take(2):
            kept.extend(reply.request_id for reply in answers.saved())
            return await steps()

    await asyncio.gather(answers.once("r2", b"2", second), answers.once("r1", b"1", first))
    assert kept == ["r1"]


async def test_idle_means_that_nothing_runs() -> None:
    answers, steps = Answers(), Steps(held=True)
    await answers.wait_idle()
    await call(answers, "r", steps)
    idle = asyncio.create_task(answers.wait_idle())
    await asyncio.sleep(0.005)
    assert not idle.done()
    steps.release.set()
    await idle
    assert steps.done == 1


async def test_a_request_id_has_at_most_128_characters() -> None:
    answers, steps = Answers(), Steps()
    await answers.once("x" * 128, b"x", steps)
    with pytest.raises(ServiceError) as refusal:
        await answers.once("x" * 129, b"x", steps)
    assert (refusal.value.code, refusal.value.reason) == (Code.INVALID_ARGUMENT, "REQUEST_ID_INVALID")
    assert (refusal.value.field, steps.done) == ("request_id", 1)
