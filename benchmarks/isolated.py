"""Rows that are measured in processes of their own, so that one that crashes or hangs takes no other with it.

Imports nothing heavy: every such process imports it again.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.harness import Row


@dataclass(frozen=True)
class Plan:
    """Where a row is measured.

    module: whose ROWS has it.
    process: rows of one name that follow each other share a process.
    limit_seconds: how long it may take, beside the start of its process.
    needs_gpu: whether there is no such thing on a CPU.
    """

    module: str
    process: str
    limit_seconds: float
    needs_gpu: bool = False


def measured(plans: Mapping[str, Plan], quick: bool, start_seconds: float) -> Iterator[Row | str]:
    """Each row as it is there, in order; what went wrong instead of one that is not."""
    waiting = list(plans)
    while waiting:
        process = plans[waiting[0]].process
        names = [name for name in waiting if plans[name].process == process]
        done = 0
        for result in _of_one_process({name: plans[name] for name in names}, quick, start_seconds):
            yield result
            done += 1
        waiting = [name for name in waiting if name not in names[:done]]


def _of_one_process(plans: Mapping[str, Plan], quick: bool, start_seconds: float) -> Iterator[Row | str]:
    """The rows that one process brings about, up to the one that ends it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(sender, {name: plan.module for name, plan in plans.items()}, quick))
    worker.start()
    sender.close()
    try:
        limit = start_seconds
        for name, plan in plans.items():
            limit += plan.limit_seconds
            if not receiver.poll(limit):
                yield f"{name}: not there after {limit:.0f} s"
                return
            try:
                yield receiver.recv()
            except EOFError:
                worker.join()
                yield f"{name}: its process ended with status {worker.exitcode}"
                return
            limit = 0
        worker.join(30)
    finally:
        _end(worker)


def _end(worker: multiprocessing.process.BaseProcess) -> None:
    """Ends a process and all that it has started; they have a group of their own."""
    assert worker.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.kill()  # should it have no group yet
    worker.join()


def _work(results: Connection, modules: Mapping[str, str], quick: bool) -> None:
    """What a process does: measures rows and sends each, or what went wrong."""
    os.setpgid(0, 0)
    for name, module in modules.items():
        try:
            results.send(importlib.import_module(module).ROWS[name](quick))
        except Exception:
            traceback.print_exc()
            results.send(f"{name}: {traceback.format_exc(limit=0).strip()}")
    results.close()
