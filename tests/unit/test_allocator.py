"""Memory of messages that have gone is used for those that come."""

import subprocess
import sys

_PROGRAM = """
import resource
from service_common.allocator import keep_freed_memory
if {tuned}:
    keep_freed_memory()
def messages():
    for _ in range(20):
        [bytes(512 << 10) for _ in range(16)]
messages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
messages()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(tuned: bool) -> int:
    run = subprocess.run([sys.executable, "-c", _PROGRAM.format(tuned=tuned)], capture_output=True, check=True)
    return int(run.stdout)


def test_it_is_not_asked_of_the_system_again() -> None:
    assert page_faults(tuned=True) < 100
    assert page_faults(tuned=False) > 10_000  # 20 times 8 MiB in pages of 4 KiB are 41,000
