"""The way to the engine: runs its methods through the executor and knows what is under way."""

import asyncio
from collections.abc import Callable
from typing import Concatenate

from trainer_service.engine import Engine
from trainer_service.executor import Executor


class Commands:
    """Runs engine methods one at a time, in the order of the calls to `run`."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self._running: set[asyncio.Future] = set()

    async def run[**P, R](self, method: Callable[Concatenate[Engine, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """See Executor.run."""
        running = asyncio.ensure_future(self._executor.run(method, *args, **kwargs))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.shield(running)

    async def wait_idle(self) -> None:
        """Waits for the end of what is under way now."""
        if self._running:
            await asyncio.wait(set(self._running))
