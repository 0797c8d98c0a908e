"""Where engine calls run: the seam behind which one process or many ranks hold the model."""

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from trainer_service.engine import Engine

P = ParamSpec("P")
R = TypeVar("R")


class Executor(Protocol):
    """Runs engine methods one at a time, in the order of the calls to `run`."""

    async def run(self, method: Callable[Concatenate[Engine, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`await executor.run(Engine.optim_step, "alice", params)`. A call that has begun runs to its end, also when
        its caller is cancelled.
        """
        ...

    def close(self) -> None:
        """Waits for the call that is running and drops those that have not begun."""
        ...


class LocalExecutor:
    """One process: the engine lives on a thread of its own, so that the event loop keeps answering."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def run(self, method: Callable[Concatenate[Engine, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """See Executor."""
        call = functools.partial(method, self._engine, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def close(self) -> None:
        """See Executor."""
        self._thread.shutdown(wait=True, cancel_futures=True)
