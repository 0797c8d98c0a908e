"""GPU memory of trainers on this host that this sampler has open, to read payloads out of it."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

from service_common import errors
from service_common.cuda_ipc import HANDLE_BYTES, host_id

log = structlog.get_logger(__name__)

# Open memory of a size by its handle, and close it, under an id, on every rank.
Open = Callable[[str, bytes, int], Awaitable[None]]
Close = Callable[[str], Awaitable[None]]


class DeviceMemory:
    """What is open, by id.

    host: the id of this host, if payloads are read that way at all; otherwise empty.
    ending: set when the sampler ends, and with it the calls that keep memory open.
    """

    def __init__(self, enabled: bool, open_: Open, close: Close):
        """`open_` raises FAILED_PRECONDITION when a rank cannot reach so much memory, and leaves it open nowhere."""
        self.host = host_id() if enabled else ""
        self._open = open_
        self._close = close
        self._sizes: dict[str, int] = {}
        self.ending = asyncio.Event()

    @contextlib.asynccontextmanager
    async def opened(self, handle: bytes, size_bytes: int, host: str) -> AsyncIterator[str]:
        """Opens memory until the block ends, and gives its id. INVALID_ARGUMENT, FAILED_PRECONDITION."""
        if len(handle) != HANDLE_BYTES:
            raise errors.invalid_argument(
                "HANDLE_INVALID", f"the handle has {len(handle)} bytes, and must have {HANDLE_BYTES}", field="handle"
            )
        if not self.host:
            raise errors.failed_precondition(
                "CUDA_IPC_OFF", "this sampler reads no GPU memory of others; start it on a GPU with --cuda-ipc"
            )
        if host != self.host:
            raise errors.failed_precondition(
                "CUDA_IPC_UNREACHABLE", f"the memory is on host {host!r}, and this sampler on {self.host!r}", host=host
            )
        memory_id = uuid.uuid4().hex
        try:
            await self._open(memory_id, handle, size_bytes)
            self._sizes[memory_id] = size_bytes
            log.info("device_memory_opened", memory_id=memory_id, size_bytes=size_bytes)
            yield memory_id
        finally:
            # Also when nobody waits any more for it to be opened: the workers open it all the same.
            self._sizes.pop(memory_id, None)
            await self._close(memory_id)
            log.info("device_memory_closed", memory_id=memory_id)

    def check(self, memory_id: str, size_bytes: int) -> None:
        """NOT_FOUND unless the memory is open, INVALID_ARGUMENT when no payload of this size fits into it."""
        if memory_id not in self._sizes:
            raise errors.not_found(
                "DEVICE_MEMORY_NOT_FOUND",
                f"GPU memory {memory_id!r} is not open here; open it with OpenDeviceMemory and keep that call",
                device_memory_id=memory_id,
            )
        if size_bytes > self._sizes[memory_id]:
            raise errors.invalid_argument(
                "PAYLOAD_TOO_LARGE",
                f"the manifest announces {size_bytes} bytes, and GPU memory {memory_id!r} has {self._sizes[memory_id]}",
                field="device_memory_id",
                size_bytes=size_bytes,
            )
