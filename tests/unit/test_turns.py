"""The order of operations on one adapter."""

import asyncio
import random

import pytest

from service_common.errors import Code, ServiceError
from trainer_service.scheduler import Turns


async def operate(turns: Turns, seq_id: int, done: list[int], seconds: float = 0.0) -> None:
    async with turns.take(seq_id):
        await asyncio.sleep(seconds)
        done.append(seq_id)


async def test_operations_run_in_the_order_of_their_numbers_whatever_order_they_arrive_in() -> None:
    turns, done = Turns("alice"), []
    numbers = list(range(1, 51))
    random.Random(0).shuffle(numbers)
    await asyncio.gather(*(operate(turns, number, done, 0.001) for number in numbers))
    assert done == list(range(1, 51))
    assert turns.next_seq_id == 51


async def test_a_failed_operation_uses_its_number_up() -> None:
    turns, done = Turns("alice"), []
    with pytest.raises(ZeroDivisionError):
        async with turns.take(1):
            raise ZeroDivisionError
    await operate(turns, 2, done)
    assert done == [2]


async def test_an_operation_whose_caller_gave_up_does_not_block_the_later_ones() -> None:
    turns, done = Turns("alice"), []
    third = asyncio.create_task(operate(turns, 3, done))
    second = asyncio.create_task(operate(turns, 2, done))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    await operate(turns, 1, done)
    await asyncio.wait_for(third, 1)
    assert done == [1, 3]


async def test_giving_up_at_the_very_moment_of_ones_turn_does_not_block_the_later_ones() -> None:
    turns, done = Turns("alice"), []
    second = asyncio.create_task(operate(turns, 2, done))
    third = asyncio.create_task(operate(turns, 3, done))
    await asyncio.sleep(0)
    await operate(turns, 1, done)  # wakes the second, which is cancelled before it runs
    second.cancel()
    await asyncio.wait_for(third, 1)
    assert done == [1, 3]


async def test_a_used_number_is_refused_and_told_the_next_one() -> None:
    turns, done = Turns("alice"), []
    await operate(turns, 1, done)
    with pytest.raises(ServiceError) as refusal:
        await operate(turns, 1, done)
    assert refusal.value.code is Code.FAILED_PRECONDITION
    assert refusal.value.reason == "SEQ_ID_USED"
    assert refusal.value.metadata["next_seq_id"] == "2"
    assert done == [1]


async def test_passing_on_lets_the_next_one_begin_before_this_one_ends() -> None:
    turns, done = Turns("alice"), []
    async with turns.take(1) as turn:
        waiting = asyncio.create_task(operate(turns, 2, done))
        await asyncio.sleep(0.01)
        assert done == []
        turn.pass_on()
        await asyncio.wait_for(waiting, 1)
    assert done == [2]
    assert turns.next_seq_id == 3


async def test_removing_the_adapter_fails_those_who_wait() -> None:
    turns = Turns("alice")
    waiting = asyncio.create_task(operate(turns, 2, []))
    await asyncio.sleep(0)
    turns.close()
    with pytest.raises(ServiceError, match="alice"):
        await waiting


async def test_unnumbered_operations_do_not_wait() -> None:
    turns, done = Turns("alice"), []
    async with turns.take(1):
        await asyncio.wait_for(operate(turns, 0, done), 1)
    assert done == [0]
