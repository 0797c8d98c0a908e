"""The same request once more when no answer came."""

import asyncio
import dataclasses
import math
import random
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tinkerbell.errors import DeadlineExceededError, UnavailableError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Retry:
    """For how long, and how often, a request that got no answer is sent again.

    Only silence is repeated: a connection that breaks or can't be made, an attempt that takes too long. An answer that
    gives a reason is final. Every attempt carries the same request_id, so what the trainer has done it does not do
    again.
    """

    total_seconds: float = 60.0
    """Time for all further attempts, from the first failure on; 0 means one attempt."""
    attempt_seconds: float | None = None
    """Time after which one attempt counts as unanswered. None means that only a broken connection does, which is
    noticed within 80 s: an operation may rightly take long, since it waits for those before it."""
    first_backoff_seconds: float = 0.1
    """Longest pause before the second attempt; it doubles with each further one, and a random half of it is left out
    so that clients don't come back all at once."""
    max_backoff_seconds: float = 5.0
    """Longest pause of all."""

    async def until_answered(
        self,
        attempt: Callable[[float | None], Awaitable[T]],
        timeout: float | None,  # noqa: ASYNC109 - the trainer hears of the deadline
    ) -> T:
        """What `attempt` returns. It is given the seconds that it may take, and called again while it gets no answer.

        `timeout`: seconds for everything; None means no limit. Raises what the last attempt raised.
        """
        clock = asyncio.get_running_loop().time
        end = math.inf if timeout is None else clock() + timeout
        last_start = None
        longest_pause = self.first_backoff_seconds
        while True:
            limit = min(end - clock(), self.attempt_seconds or math.inf)
            pause = longest_pause * random.uniform(0.5, 1.0)
            try:
                return await attempt(None if limit == math.inf else limit)
            except (UnavailableError, DeadlineExceededError) as error:
                now = clock()
                if last_start is None:
                    last_start = min(end, now + self.total_seconds)
                if error.reason or now + pause >= last_start:
                    raise
            await asyncio.sleep(pause)
            longest_pause = min(2 * longest_pause, self.max_backoff_seconds)


DEFAULT_RETRY = Retry()


def new_request_id() -> str:
    """What makes a mutation recognisable when it is sent again."""
    return uuid.uuid4().hex
