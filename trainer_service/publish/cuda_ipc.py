"""Weights on the trainer's GPU, where samplers on the same host read them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import grpc
import structlog
import torch

from service_common.cuda_ipc import host_id
from service_common.device_memory import DeviceMemoryError, SharedMemory
from tinkerbell.errors import TinkerbellError
from trainer_service.publish.replica import Replica, is_down
from trainer_service.ranks import OnRankZero

log = structlog.get_logger(__name__)

# One is written while another one is read, for two adapters at a time.
_MAX_AREAS = 4


class CudaIpc:
    """Areas of GPU memory that publications take in turn. Samplers keep them open, since opening one takes 0.2 s."""

    def __init__(self, device: torch.device):
        """`device`: where the first rank's weights are."""
        self._device = device
        self._host = host_id()
        self._areas: list[_Area] = []
        self._free: list[_Area] = []
        self._freed = asyncio.Condition()

    def obstacle(self, replica: Replica) -> str:
        """Why this sampler cannot read the memory; empty if nothing is known to be in the way."""
        if replica.cuda_ipc_obstacle:
            return replica.cuda_ipc_obstacle
        if not replica.cuda_ipc_host:
            return "the sampler was started without --cuda-ipc"
        return "" if replica.cuda_ipc_host == self._host else "the sampler is on another host"

    @contextlib.asynccontextmanager
    async def staged(self, size_bytes: int, replicas: Iterable[Replica]) -> AsyncIterator["Staged"]:
        """Room for a payload that these samplers are to read, until the block ends; none if none of them can.

        Nor is there any if the GPU has no memory.
        """
        if all(self.obstacle(replica) for replica in replicas):
            yield Staged(self, None, "the sampler has only just been found")
            return
        try:
            area = await self._take(size_bytes)
        except DeviceMemoryError as failure:
            log.warning("cuda_ipc_no_memory", size_bytes=size_bytes, error=str(failure))
            yield Staged(self, None, f"the trainer's GPU has no room: {failure}")
            return
        try:
            yield Staged(self, area)
        finally:
            async with self._freed:
                self._free.append(area)
                self._freed.notify()

    async def _take(self, size_bytes: int) -> "_Area":
        async with self._freed:
            await self._freed.wait_for(lambda: self._free or len(self._areas) < _MAX_AREAS)
            fitting = [area for area in self._free if area.memory.size_bytes >= size_bytes]
            if fitting:
                area = min(fitting, key=lambda area: area.memory.size_bytes)
                self._free.remove(area)
                return area
            if len(self._areas) == _MAX_AREAS:  # a free one is too small, and makes room
                small = self._free.pop()
                self._areas.remove(small)
                await asyncio.to_thread(small.free)
            area = _Area(await asyncio.to_thread(self._allocate, size_bytes))
            self._areas.append(area)
            return area

    def _allocate(self, size_bytes: int) -> SharedMemory:
        try:
            return SharedMemory(size_bytes, self._device)
        except DeviceMemoryError:
            torch.cuda.empty_cache()  # PyTorch keeps what it does not use
            return SharedMemory(size_bytes, self._device)


class Staged:
    """One publication's place in the memory, if it has one.

    fill: what copies the payload there, on the first rank: any tensor of at most the size that was asked for.
    """

    def __init__(self, ipc: CudaIpc, area: "_Area | None", no_area: str = ""):
        """`no_area`: why a sampler that could read the memory cannot this time."""
        self._ipc = ipc
        self._area = area
        self._no_area = no_area
        self.fill = OnRankZero(area.fill) if area else None

    def reaches(self, replica: Replica) -> bool:
        """Whether nothing is known to keep this sampler from reading the payload here."""
        return self._area is not None and not self._ipc.obstacle(replica)

    async def opened_by(self, replica: Replica) -> tuple[str, str]:
        """The sampler's id for the memory and ""; or "" and why it has none. TinkerbellError when it is down."""
        if obstacle := self._ipc.obstacle(replica):
            return "", obstacle
        if self._area is None:
            return "", self._no_area
        try:
            return await self._area.opened_by(replica), ""
        except TinkerbellError as failure:
            if is_down(failure):
                raise
            log.warning("cuda_ipc_refused", sampler=replica.address, error=str(failure))
            replica.cuda_ipc_obstacle = str(failure)
            return "", replica.cuda_ipc_obstacle


class _Area:
    """Memory, and the calls by which samplers have it open."""

    def __init__(self, memory: SharedMemory):
        self.memory = memory
        self._opened: dict[Replica, tuple[grpc.aio.Call, str]] = {}

    def fill(self, payload: torch.Tensor) -> None:
        content = payload.view(torch.uint8)
        self.memory.tensor[: len(content)].copy_(content)

    async def opened_by(self, replica: Replica) -> str:
        call, memory_id = self._opened.get(replica, (None, ""))
        if call is None or call.done():  # never opened, or the sampler is another process by now
            call, memory_id = await replica.open_device_memory(self.memory.handle, self.memory.size_bytes)
            self._opened = {other: entry for other, entry in self._opened.items() if not entry[0].done()}
            self._opened[replica] = (call, memory_id)
        return memory_id

    def free(self) -> None:
        for call, _ in self._opened.values():
            call.cancel()
        self.memory.free()
