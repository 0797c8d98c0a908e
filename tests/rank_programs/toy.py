"""One rank of a group with a toy engine, whose methods meet in real collectives. `toy.py SCENARIO FOLDER`.

Rank 0 runs the scenario; every rank that ends as it should leaves the file FOLDER/ended-RANK.
"""

import asyncio
import contextlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from service_common import errors, logs
from service_common.errors import ServiceError
from tinkerbell.v1 import common_pb2
from trainer_service.ranks import Group, OnRankZero, Process, RanksExecutor, follow, may_take

COMMAND_TIMEOUT = 3.0
TICK = 0.5


class Toy:
    """Keeps a journal of what it did."""

    def __init__(self, rank: int):
        self.rank = rank
        self.journal: list[int] = []

    def add(self, value: int) -> float:
        """The sum over ranks of value + rank."""
        self.journal.append(value)
        return self.reduce(float(value + self.rank))

    def reduce(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total)

    def journals(self) -> list[list[int]]:
        everybody = [None] * distributed.get_world_size()
        distributed.all_gather_object(everybody, self.journal)
        return everybody

    def checksum(self, values: np.ndarray, config: common_pb2.LoraConfig, *, factor: float) -> float:
        return self.reduce(float(values.sum()) * factor + config.rank)

    def ignore(self, values: np.ndarray | None) -> None:
        pass

    def progress(self, report) -> None:
        report(f"rank {self.rank}")
        self.reduce(0.0)

    def refuse(self, rank: int | None) -> None:
        if rank in {None, self.rank}:
            raise errors.invalid_argument("TOO_LARGE", "it is too large", value=7)

    def refuse_otherwise(self) -> None:
        raise errors.invalid_argument(f"R{self.rank}", "each for its own reason")

    def fail(self, rank: int) -> float:
        """`rank` raises while the others wait for it in a collective."""
        if self.rank == rank:
            raise ZeroDivisionError("by design")
        return self.reduce(1.0)

    def sleep(self, rank: int, seconds: float) -> float:
        if self.rank == rank:
            time.sleep(seconds)
        return self.reduce(1.0)

    def freeze(self, rank: int, file: Path) -> None:
        """`rank` stops, as a whole, a moment after the command."""

        def stop() -> None:
            file.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

        if self.rank == rank:
            threading.Timer(0.2, stop).start()

    @may_take(60)
    def sleep_long(self, seconds: float) -> None:
        time.sleep(seconds)


class Scenarios:
    """What rank 0 does; the answers go into FOLDER/report.json."""

    def __init__(self, executor: RanksExecutor, folder: Path):
        self.executor = executor
        self.folder = folder

    async def answers(self) -> dict:
        run = self.executor.run
        report = {}

        async def caller(first: int) -> list[float]:
            return [await run(Toy.add, first + i) for i in range(20)]

        report["sums"] = await asyncio.gather(*(caller(100 * i) for i in range(8)))
        report["at_once"] = await asyncio.gather(*(run(Toy.add, 1000 + i) for i in range(50)))
        report["refusals"] = []
        for _ in range(2):
            try:
                await run(Toy.refuse, None)
            except ServiceError as error:
                report["refusals"].append([error.code.value, error.reason, error.message, error.metadata])
        with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
            await run(Toy.ignore, threading.Lock())
            report["pickled_a_lock"] = True
        values = np.arange(1 << 20, dtype=np.float64)
        report["checksum"] = await run(Toy.checksum, values, common_pb2.LoraConfig(rank=3), factor=0.5)
        stages = []
        await run(Toy.progress, OnRankZero(stages.append))
        report["stages"] = stages
        running = asyncio.create_task(run(Toy.sleep, 1, 0.2))
        begun = asyncio.create_task(run(Toy.add, 5000))
        dropped = asyncio.create_task(run(Toy.add, 5001))
        await asyncio.sleep(0.1)
        running.cancel()
        dropped.cancel()
        report["after_cancel"] = await begun
        await run(Toy.sleep_long, COMMAND_TIMEOUT + 0.5)
        await asyncio.sleep(4 * TICK)  # nothing but ticks
        report["journals"] = await run(Toy.journals)
        return report

    async def close_drops(self) -> dict:
        self._begin()
        calls = [asyncio.create_task(self.executor.run(Toy.sleep, 1, 0.5))]
        calls += [asyncio.create_task(self.executor.run(Toy.add, value)) for value in range(3)]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(self.executor.close)
        ends = await asyncio.gather(*calls, return_exceptions=True)
        with contextlib.suppress(RuntimeError):
            await self.executor.run(Toy.add, 1)
            ends.append("accepted")
        return {"ends": [type(end).__name__ for end in ends]}

    async def fail(self) -> None:
        self._begin()
        await self.executor.run(Toy.fail, 1)

    async def refuse_alone(self) -> None:
        self._begin()
        await self.executor.run(Toy.refuse, 1)

    async def refuse_otherwise(self) -> None:
        self._begin()
        await self.executor.run(Toy.refuse_otherwise)

    async def hang(self) -> None:
        self._begin()
        await self.executor.run(Toy.sleep, 1, 600.0)

    async def freeze(self) -> None:
        await self.executor.run(Toy.freeze, 1, self.folder / "froze")
        await asyncio.sleep(600)

    async def idle(self) -> None:
        self._begin()
        await asyncio.sleep(600)

    async def busy(self) -> None:
        sleeping = asyncio.create_task(self.executor.run(Toy.sleep_long, 50.0))
        await asyncio.sleep(0.2)
        self._begin()
        await sleeping

    async def drain(self) -> dict:
        signalled = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signalled.set)
        # The follower, which has executed this, ignores signals.
        await self.executor.run(Toy.add, 0)
        self._begin()
        await signalled.wait()
        await asyncio.sleep(4 * TICK)  # longer than followers wait for a sign of life
        return {"sum": await self.executor.run(Toy.sleep, 1, 0.5)}

    def _begin(self) -> None:
        (self.folder / "began").touch()

    async def restart(self) -> dict:
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        total = await self.executor.run(Toy.fail, 1 if attempt == 0 else -1)
        return {"attempt": attempt, "sum": total}


def main(scenario: str, folder: Path) -> None:
    logs.configure("toy")
    process = Process.from_environment()
    group = Group(process, process.device("cpu"), command_timeout=COMMAND_TIMEOUT, tick=TICK)
    engine = Toy(process.rank)
    if process.rank:
        follow(engine, group)
    else:
        executor = RanksExecutor(engine, group)
        report = asyncio.run(getattr(Scenarios(executor, folder), scenario)())
        executor.close()
        (folder / "report.json").write_text(json.dumps(report))
    (folder / f"ended-{process.rank}").touch()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
