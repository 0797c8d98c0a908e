"""What runs inside each vLLM worker: adapters from memory instead of from disk.

vLLM loads an adapter from a folder, and offers no other way. Its manager is replaced by one that knows a second kind of
path, the URI of a version that was pushed. The store behind these is the truth, and vLLM's caches above it may evict
and load again as they like.
"""

import functools
import mmap
import os
import select
import signal
import threading
from typing import Any, BinaryIO

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin

from sampler_service import cpu_lora
from sampler_service.adapter_slots import Layout, SlotManager, StoredAdapter
from sampler_service.environment import SAMPLER_PID
from sampler_service.versions import URI_PREFIX
from service_common import device_memory


class SharedBuffers:
    """The service's staging buffers, mapped into this process. They come again, and mapping one takes long."""

    def __init__(self, pinned: bool):
        """`pinned`: lock them in place, so that a GPU copies at full speed, which takes longer still."""
        self._pinned = pinned
        self._mapped: dict[int, tuple[BinaryIO, torch.Tensor]] = {}

    def open(self, path: str, size_bytes: int) -> torch.Tensor:
        """uint8 [size_bytes]: the memory behind `path`."""
        self._close_freed()
        file = open(path, "r+b")  # noqa: SIM115
        key = os.fstat(file.fileno()).st_ino  # a path may soon mean another buffer
        if key in self._mapped:
            file.close()
        else:
            buffer = torch.frombuffer(mmap.mmap(file.fileno(), size_bytes), dtype=torch.uint8)
            if self._pinned:
                device_memory.pin(buffer)
            self._mapped[key] = (file, buffer)
        return self._mapped[key][1]

    def _close_freed(self) -> None:
        """What the service has given back to the system has no size any more."""
        for key, (file, buffer) in list(self._mapped.items()):
            if not os.fstat(file.fileno()).st_size:
                if self._pinned:
                    device_memory.unpin(buffer.data_ptr())
                file.close()
                del self._mapped[key]


class StoreLoRAManager(LRUCacheWorkerLoRAManager):
    """Loads adapters from `store` when their path is a key of it.

    reloads: how often it has loaded one that it had loaded before.
    """

    _manager_cls = SlotManager

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.store: dict[str, StoredAdapter] = {}
        self.reloads = 0
        self.buffers = SharedBuffers(pinned=self.device.type == "cuda")
        self.device_memory: dict[str, device_memory.OpenedMemory] = {}
        self.layout = functools.lru_cache(maxsize=64)(Layout)

    def install(self, request: LoRARequest, adapter: StoredAdapter, on_device: torch.Tensor) -> str:
        """Stores an adapter and gives it a slot; or answers with the name of a tensor that is not finite.

        `on_device`: its payload where the model is.
        """
        if culprit := adapter.layout.not_finite(on_device, self.lora_config.lora_dtype):
            return culprit
        self.store[request.lora_path] = adapter
        adapter.on_device = on_device
        self.add_adapter(request)
        adapter.on_device = None
        return ""

    def drop(self, uri: str, lora_id: int) -> None:
        """Forgets an adapter, if it is there."""
        if adapter := self.store.pop(uri, None):
            adapter.settle()
        self.remove_adapter(lora_id)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if not lora_request.lora_path.startswith(URI_PREFIX):
            return super()._load_adapter(lora_request)
        if lora_request.lora_path not in self.store:
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path)
        adapter = self.store[lora_request.lora_path]
        self.reloads += adapter.on_device is None
        return adapter


def _end_with(pid: int) -> None:
    """Ends this process when that one has ended. vLLM's processes do not notice that their parent was killed."""
    process = os.pidfd_open(pid)

    def wait() -> None:
        select.select([process], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


_end_with(int(os.environ[SAMPLER_PID]))
# This module is imported before the worker makes its manager, by the name that is replaced.
lora_model_runner_mixin.LRUCacheWorkerLoRAManager = StoreLoRAManager
if current_platform.is_cpu():
    cpu_lora.use_grouped_lora()


class LoraWorkerExtension:
    """Methods that vLLM adds to its worker class; the engine calls them by name on every rank."""

    model_runner: Any  # the worker's own
    rank: int

    def tinkerbell_install(
        self, lora_name: str, lora_id: int, uri: str, path: str, size_bytes: int, layout: bytes, memory_id: str
    ) -> tuple[str, bytes]:
        """Installs the payload in the file at `path`, which must neither change nor go before `tinkerbell_drop`.

        `layout`: as Layout takes it. `memory_id`: of GPU memory that has the payload; it is copied to the file.

        Answers with the name of a tensor that is not finite in this model's dtype, in which case nothing is installed,
        or otherwise "", and with the BLAKE3 of what the GPU memory had.
        """
        manager: StoreLoRAManager = self.model_runner.lora_manager
        parsed = manager.layout(layout)
        adapter = StoredAdapter(lora_id, parsed, manager.buffers.open(path, size_bytes))
        request = LoRARequest(lora_name, lora_id, uri)
        if not memory_id:
            return manager.install(request, adapter, adapter.payload.to(manager.device)), b""
        from service_common.blake3_kernels import payload_hash  # noqa: PLC0415  (Triton)

        # First of all a copy: what is checked must be what is installed, and the memory may be another GPU's. Hashing
        # waits for it, so that the memory can be written again when this returns.
        payload = torch.empty(parsed.size, dtype=parsed.dtype, device=manager.device)
        manager.device_memory[memory_id].copy_to(payload, 0)
        digest = payload_hash(payload)
        not_finite = manager.install(request, adapter, payload)
        if self.rank == 0 and not not_finite:
            adapter.fetch(payload)
        return not_finite, digest

    def tinkerbell_settle(self, uri: str) -> None:
        """Waits until the file of an adapter has all of its payload."""
        self.model_runner.lora_manager.store[uri].settle()

    def tinkerbell_open_memory(self, memory_id: str, handle: bytes, size_bytes: int) -> str:
        """Opens another process's GPU memory; or answers with what is against it."""
        manager: StoreLoRAManager = self.model_runner.lora_manager
        try:
            manager.device_memory[memory_id] = device_memory.OpenedMemory(handle, size_bytes, manager.device)
        except device_memory.DeviceMemoryError as cause:
            return str(cause)
        return ""

    def tinkerbell_close_memory(self, memory_id: str) -> None:
        """Closes it, if it is open."""
        opened = self.model_runner.lora_manager.device_memory.pop(memory_id, None)
        if opened:
            opened.close()

    def tinkerbell_reloads(self) -> int:
        """How often this worker has loaded an adapter again that vLLM had evicted."""
        return self.model_runner.lora_manager.reloads

    def tinkerbell_drop(self, uri: str, lora_id: int) -> None:
        """Forgets an adapter, if it is there. No request may run on it or wait for it."""
        self.model_runner.lora_manager.drop(uri, lora_id)
