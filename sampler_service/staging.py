"""Memory where a payload gathers until it is whole, readable by vLLM's workers."""

import mmap
import os


class StagingBuffer:
    """Anonymous memory with a path: the workers open it, and nothing of it outlives the last process that has it open.

    A file in /dev/shm would stay behind when this process is killed in the middle of a push.
    """

    def __init__(self, size_bytes: int):
        """`size_bytes` above 0. OSError when the host has no memory for it."""
        self._descriptor = os.memfd_create("tinkerbell-push", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._descriptor, size_bytes)
            self.view = memoryview(mmap.mmap(self._descriptor, size_bytes))
        except BaseException:
            os.close(self._descriptor)
            raise
        self.size_bytes = size_bytes

    @property
    def path(self) -> str:
        """Where processes of the same user on this host can open the buffer, as long as it is not closed."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Gives the memory back, whoever still refers to `view`; nobody may touch it any more."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
