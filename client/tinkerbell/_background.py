"""The event loop behind the blocking clients: one daemon thread per process."""

import asyncio
import concurrent.futures
import functools
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


class LoopThread:
    """Runs coroutines on an event loop in a thread of its own."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tinkerbell", daemon=True)
        self._to_the_end: set[concurrent.futures.Future] = set()  # the loop itself holds tasks only weakly
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result. An interrupt while waiting cancels it."""
        return self.wait(self.submit(coroutine))

    def wait(self, future: concurrent.futures.Future[T]) -> T:
        """The future's result. An interrupt while waiting cancels it. RuntimeError in the loop's own thread."""
        try:
            if threading.current_thread() is self._thread:
                raise RuntimeError("this blocks, and a future's done-callback must not: it would wait for itself")
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts the coroutine. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def submit_to_the_end(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts the coroutine, which runs to its end: cancelling the future only drops the result."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        async def settle() -> None:
            try:
                result = await coroutine
            except asyncio.CancelledError:
                future.cancel()
                raise
            except Exception as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(result)

        running = self.submit(settle())
        self._to_the_end.add(running)
        running.add_done_callback(self._to_the_end.discard)
        return future

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """The generator's items; leaving the iteration early closes it."""

        async def step() -> T:
            return await anext(source, _END)

        try:
            while (item := self.run(step())) is not _END:
                yield item
        finally:
            self.submit(_close(source))


@functools.cache
def loop_thread() -> LoopThread:
    """The thread that all clients of this process share."""
    return LoopThread()


async def _close(source: AsyncGenerator[Any, None]) -> None:
    await source.aclose()
