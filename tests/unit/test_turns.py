"""The order of operations on one adapter."""

import asyncio
import random

import pytest

from service_common.errors import Code, ServiceError
from trainer_service.order import NotBegun, Turns


async def operate(turns: Turns, seq_id: int, done: list[int], seconds: float = 0.0) -> None:
    async with turns.take(seq_id):
        await asyncio.sleep(seconds)
        done.append(seq_id)


async def begin(turns: Turns, seq_id: int, done: list[int], seconds: float = 0.0) -> asyncio.Task[None]:
    task = asyncio.create_task(operate(turns, seq_id, done, seconds))
    await asyncio.sleep(0)
    return task


async def refusal_of(turns: Turns, seq_id: int) -> NotBegun:
    with pytest.raises(NotBegun) as refusal:
        await asyncio.wait_for(operate(turns, seq_id, []), 1)
    return refusal.value


async def test_operations_run_in_the_order_of_their_numbers_whatever_order_they_arrive_in() -> None:
    turns, done = Turns("alice"), []
    numbers = list(range(1, 51))
    random.Random(0).shuffle(numbers)
    await asyncio.gather(*(operate(turns, number, done, 0.001) for number in numbers))
    assert done == list(range(1, 51))
    assert turns.next_seq_id == 51


async def test_numbered_operations_do_not_overlap() -> None:
    turns, running = Turns("alice"), []

    async def alone(seq_id: int) -> None:
        async with turns.take(seq_id):
            running.append(seq_id)
            await asyncio.sleep(0.002)
            assert running == [seq_id]
            running.remove(seq_id)

    await asyncio.gather(*(alone(seq_id) for seq_id in (3, 1, 2)))


async def test_a_failed_operation_uses_its_number_up() -> None:
    turns, done = Turns("alice"), []
    with pytest.raises(ZeroDivisionError):
        async with turns.take(1):
            raise ZeroDivisionError
    await operate(turns, 2, done)
    assert done == [2]


async def test_a_used_number_is_refused_and_told_the_next_one() -> None:
    turns, done = Turns("alice"), []
    await operate(turns, 1, done)
    refusal = await refusal_of(turns, 1)
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "SEQ_ID_USED")
    assert refusal.metadata["next_seq_id"] == "2"
    assert done == [1]


async def test_a_number_is_refused_while_its_first_operation_runs_or_waits() -> None:
    turns, done = Turns("alice"), []
    async with turns.take(1):
        third = await begin(turns, 3, done)
        assert turns.next_seq_id == 2
        assert (await refusal_of(turns, 1)).reason == "SEQ_ID_USED"
        assert (await refusal_of(turns, 3)).reason == "SEQ_ID_USED"
    await asyncio.gather(operate(turns, 2, done), third)
    assert done == [2, 3]


async def test_passing_on_lets_the_next_one_begin_before_this_one_ends() -> None:
    turns, done = Turns("alice"), []
    async with turns.take(1) as turn:
        waiting = await begin(turns, 2, done)
        await asyncio.sleep(0.01)
        assert done == []
        turn.pass_on()
        await asyncio.wait_for(waiting, 1)
    assert done == [2]
    assert turns.next_seq_id == 3


async def test_passing_on_twice_lets_one_operation_begin() -> None:
    turns, done = Turns("alice"), []
    async with turns.take(1) as first:
        first.pass_on()
        async with turns.take(2):
            first.pass_on()
            third = await begin(turns, 3, done)
            await asyncio.sleep(0.01)
            assert done == []
    await third


async def test_removing_the_adapter_fails_those_who_wait() -> None:
    turns = Turns("alice")
    async with turns.take(1):
        waiting = await begin(turns, 2, [])
        turns.close()
        with pytest.raises(NotBegun, match="alice") as refusal:
            await waiting
    assert (refusal.value.code, refusal.value.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_unnumbered_operations_do_not_wait() -> None:
    turns, done = Turns("alice"), []
    async with turns.take(1):
        await asyncio.wait_for(operate(turns, 0, done), 1)
    assert done == [0]
    assert turns.next_seq_id == 2


async def test_an_operation_whose_predecessor_never_comes_fails_and_may_come_again() -> None:
    turns, done = Turns("alice", gap_seconds=0.02), []
    third, fourth = await begin(turns, 3, done), await begin(turns, 4, done)
    with pytest.raises(NotBegun, match=r"operation 3 .* operation 1") as refusal:
        await asyncio.wait_for(third, 1)
    assert (refusal.value.code, refusal.value.reason) == (Code.FAILED_PRECONDITION, "SEQ_ID_GAP")
    assert refusal.value.metadata == {"adapter_id": "alice", "seq_id": "3", "next_seq_id": "1"}
    with pytest.raises(ServiceError, match="operation 4"):
        await asyncio.wait_for(fourth, 1)
    await asyncio.gather(*(operate(turns, seq_id, done) for seq_id in (3, 2, 1)))
    assert done == [1, 2, 3]


@pytest.mark.parametrize("seq_id", [0, 1])
async def test_nobody_gives_up_while_an_operation_of_the_adapter_runs(seq_id: int) -> None:
    turns, done = Turns("alice", gap_seconds=0.02), []
    async with turns.take(seq_id):
        waiting = await begin(turns, 3, done)
        await asyncio.sleep(0.1)
        assert not waiting.done()
    with pytest.raises(NotBegun):
        await asyncio.wait_for(waiting, 1)


async def test_nobody_gives_up_while_a_turn_that_was_passed_on_still_runs() -> None:
    turns, done = Turns("alice", gap_seconds=0.02), []
    async with turns.take(1) as turn:
        turn.pass_on()
        waiting = await begin(turns, 3, done)
        await asyncio.sleep(0.1)
        assert not waiting.done()
    await asyncio.gather(operate(turns, 2, done), waiting)
    assert done == [2, 3]


async def test_an_arrival_restarts_the_clock() -> None:
    turns, done = Turns("alice", gap_seconds=0.3), []
    waiting = [await begin(turns, 5, done)]
    for seq_id in (4, 3, 2):
        await asyncio.sleep(0.12)  # 0.36 s in all
        waiting.append(await begin(turns, seq_id, done))
    await asyncio.gather(operate(turns, 1, done), *waiting)
    assert done == [1, 2, 3, 4, 5]


async def test_after_a_restart_a_number_beyond_the_next_is_told_where_the_adapter_stands() -> None:
    turns, done = Turns("alice", next_seq_id=5, restored_step=2, overtaking_seconds=0.1), []
    refusal = await refusal_of(turns, 7)
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_RESTORED")
    assert refusal.metadata == {"adapter_id": "alice", "seq_id": "7", "step": "2", "next_seq_id": "5"}
    assert "stands at step 2" in refusal.message
    assert (await refusal_of(turns, 4)).reason == "SEQ_ID_USED"
    await operate(turns, 5, done)
    await asyncio.gather(operate(turns, 7, done), operate(turns, 6, done))
    assert done == [5, 6, 7]


async def test_after_a_restart_calls_that_were_sent_together_may_overtake_each_other() -> None:
    turns, done = Turns("alice", next_seq_id=5, restored_step=2, overtaking_seconds=0.3), []
    overtaking = [await begin(turns, 7, done), await begin(turns, 6, done)]
    await asyncio.sleep(0.1)
    await asyncio.gather(operate(turns, 5, done), *overtaking)
    assert done == [5, 6, 7]


async def test_an_unnumbered_operation_ends_the_state_after_a_restart() -> None:
    turns, done = Turns("alice", next_seq_id=5, restored_step=0, overtaking_seconds=0.1), []
    assert (await refusal_of(turns, 6)).metadata["step"] == "0"
    await operate(turns, 0, done)
    await asyncio.gather(operate(turns, 6, done), operate(turns, 5, done))
    assert done == [0, 5, 6]


async def test_an_unnumbered_operation_that_goes_alone_waits_for_the_one_that_runs_and_holds_the_next_up() -> None:
    turns, done = Turns("alice"), []

    async def alone() -> None:
        async with turns.take(0, alone=True) as turn:
            assert turns.next_seq_id == 2
            await asyncio.sleep(0.002)
            done.append(0)
            turn.pass_on()
            await asyncio.sleep(0.002)
            done.append(-1)

    async with turns.take(1):
        task = asyncio.create_task(alone())
        waiting = await begin(turns, 2, done)
        await asyncio.sleep(0.005)
        assert done == []
    await asyncio.gather(task, waiting)
    assert done == [0, 2, -1]
    assert turns.next_seq_id == 3


async def test_removing_the_adapter_fails_those_who_wait_to_go_alone() -> None:
    turns = Turns("alice")

    async def alone() -> None:
        async with turns.take(0, alone=True):
            raise AssertionError

    async with turns.take(1):
        waiting = asyncio.create_task(alone())
        await asyncio.sleep(0)
        turns.close()
        with pytest.raises(NotBegun, match="alice"):
            await waiting


async def test_idle_is_when_no_operation_runs_numbered_or_not() -> None:
    turns = Turns("alice")
    async with turns.take(0):
        idle = asyncio.create_task(turns.wait_idle())
        async with turns.take(1):
            pass
        await asyncio.sleep(0.002)
        assert not idle.done()
    await asyncio.wait_for(idle, 1)


async def test_neither_kind_of_operation_keeps_the_other_one_waiting() -> None:
    turns, done = Turns("alice"), []

    async def alone() -> None:
        async with turns.take(0, alone=True):
            await asyncio.sleep(0)
            done.append(0)

    async with turns.take(1):
        tasks = [asyncio.create_task(alone()) for _ in range(3)]
        tasks += [await begin(turns, number, done) for number in (2, 3)]
    await asyncio.gather(*tasks)
    assert done == [0, 2, 0, 3, 0]


async def test_an_operation_that_has_its_turn_is_not_idle_before_it_runs() -> None:
    turns = Turns("alice")
    async with turns.take(1):
        waiting = await begin(turns, 2, [])
    assert not waiting.done()
    idle = asyncio.create_task(turns.wait_idle())
    await asyncio.wait([idle, waiting], return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait_for(idle, 1)
    assert waiting.done()
