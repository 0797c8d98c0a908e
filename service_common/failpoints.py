"""Named places at which a service can be made to die, for tests of what happens then. All are off by default.

TINKERBELL_FAILPOINTS=push.committing     the process kills itself (SIGKILL) where it reaches this place
TINKERBELL_FAILPOINTS=sync.committing:3   the third time that it does

Names are separated by commas; docs/faults.md lists them.
"""

import asyncio
import collections
import os
import signal

VARIABLE = "TINKERBELL_FAILPOINTS"

_reached: collections.Counter[str] = collections.Counter()


async def reached(name: str) -> None:
    """Dies here if the environment says so."""
    for failpoint in filter(None, os.environ.get(VARIABLE, "").split(",")):
        wanted, _, count = failpoint.partition(":")
        if wanted == name:
            _reached[name] += 1
            if _reached[name] == int(count or 1):
                await asyncio.sleep(0.1)  # what was written before is on its way
                os.kill(os.getpid(), signal.SIGKILL)
