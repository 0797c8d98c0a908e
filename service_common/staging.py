"""Memory for payloads that processes of a service share."""

import collections
import mmap
import os
from collections.abc import Callable

_NAME = "tinkerbell-push"


class StagingBuffer:
    """Anonymous memory with a path: other processes open it, and nothing outlives the last one that has it open.

    A file in /dev/shm would stay behind when this process is killed in the middle of a push.
    """

    def __init__(self, size_bytes: int, give_back: Callable[["StagingBuffer"], None]):
        """`size_bytes` above 0; `give_back` is what `close` calls. OSError when the host has no memory for it."""
        self.descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, size_bytes)
            self.view = memoryview(mmap.mmap(self.descriptor, size_bytes))
        except BaseException:
            os.close(self.descriptor)
            raise
        self.size_bytes = size_bytes
        self._give_back = give_back

    @property
    def path(self) -> str:
        """Where processes of the same user on this host can open the buffer, as long as it is not closed."""
        return _path(os.getpid(), self.descriptor)

    def close(self) -> None:
        """Ends its use by one version. Neither this process nor another one may touch it any more."""
        self._give_back(self)

    def free(self) -> None:
        """Gives the memory back to the system, whoever still refers to `view`."""
        os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


def read(pid: int, descriptor: int, target: memoryview) -> None:
    """Fills `target` from another process's buffer. OSError when that has no such buffer, or a smaller one."""
    path = _path(pid, descriptor)
    # Someone else may have named it: nothing but a buffer is opened.
    if os.readlink(path) != f"/memfd:{_NAME} (deleted)":
        raise OSError(f"{path} is no staging buffer")
    file = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(target):  # Linux reads at most 2 GiB at once
            count = os.preadv(file, [target[done:]], done)
            if not count:
                raise OSError(f"{path} has {done} of {len(target)} bytes")
            done += count
    finally:
        os.close(file)


def _path(pid: int, descriptor: int) -> str:
    return f"/proc/{pid}/fd/{descriptor}"


class StagingPool:
    """Buffers that are used again: the first touch of new memory takes several times as long as copying into it.

    used_bytes: in buffers that have been taken and not been closed.
    """

    # What adapters come to that are pushed ten times a second, since a version goes a second after its last use.
    _MAX_FREE_BYTES = 4 << 30

    def __init__(self) -> None:
        self.used_bytes = 0
        self._free: collections.deque[StagingBuffer] = collections.deque()  # the first came first

    def take(self, size_bytes: int) -> StagingBuffer:
        """A buffer of this size, above 0, with anything in it. OSError when the host has no memory for it."""
        buffer = next((free for free in self._free if free.size_bytes == size_bytes), None)
        if buffer is None:
            buffer = StagingBuffer(size_bytes, self._give_back)
        else:
            self._free.remove(buffer)
        self.used_bytes += size_bytes
        return buffer

    def _give_back(self, buffer: StagingBuffer) -> None:
        self.used_bytes -= buffer.size_bytes
        self._free.append(buffer)
        while sum(free.size_bytes for free in self._free) > self._MAX_FREE_BYTES:
            self._free.popleft().free()
