"""What runs inside each vLLM worker: adapters from memory instead of from disk.

vLLM loads an adapter from a folder, and offers no other way. Its manager is replaced by one that knows a second kind of
path, the URI of a version that was pushed. The store behind these is the truth, and vLLM's caches above it may evict
and load again as they like.
"""

import collections
import functools
import mmap
import os
import weakref
from typing import Any

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin

from sampler_service import cpu_lora
from sampler_service.adapter_slots import Layout, SlotManager, StoredAdapter
from sampler_service.staging import StagingPool
from sampler_service.versions import URI_PREFIX


class SharedBuffers:
    """The service's staging buffers, mapped into this process. They come again, and mapping one takes long."""

    def __init__(self) -> None:
        self._mapped: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._latest: collections.deque[torch.Tensor] = collections.deque(maxlen=2 * StagingPool.MAX_FREE)

    def open(self, path: str, size_bytes: int) -> torch.Tensor:
        """uint8 [size_bytes]: the memory behind `path`."""
        with open(path, "r+b") as file:
            key = os.fstat(file.fileno()).st_ino  # a path may soon mean another buffer
            buffer = self._mapped.get(key)
            if buffer is None:
                buffer = torch.frombuffer(mmap.mmap(file.fileno(), size_bytes), dtype=torch.uint8)
                self._mapped[key] = buffer
        self._latest.append(buffer)
        return buffer


class StoreLoRAManager(LRUCacheWorkerLoRAManager):
    """Loads adapters from `store` when their path is a key of it.

    reloads: how often it has loaded one that it had loaded before.
    """

    _manager_cls = SlotManager

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.store: dict[str, StoredAdapter] = {}
        self.reloads = 0
        self.buffers = SharedBuffers()
        self.layout = functools.lru_cache(maxsize=64)(Layout)

    def install(self, request: LoRARequest, adapter: StoredAdapter) -> str:
        """Stores an adapter and gives it a slot; or answers with the name of a tensor that is not finite."""
        adapter.on_device = adapter.payload.to(self.device)
        if culprit := adapter.layout.not_finite(adapter.on_device, self.lora_config.lora_dtype):
            return culprit
        self.store[request.lora_path] = adapter
        self.add_adapter(request)
        adapter.on_device = None
        return ""

    def drop(self, uri: str, lora_id: int) -> None:
        """Forgets an adapter, if it is there."""
        self.store.pop(uri, None)
        self.remove_adapter(lora_id)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if not lora_request.lora_path.startswith(URI_PREFIX):
            return super()._load_adapter(lora_request)
        if lora_request.lora_path not in self.store:
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path)
        adapter = self.store[lora_request.lora_path]
        self.reloads += adapter.on_device is None
        return adapter


# This module is imported before the worker makes its manager, by the name that is replaced.
lora_model_runner_mixin.LRUCacheWorkerLoRAManager = StoreLoRAManager
if current_platform.is_cpu():
    cpu_lora.use_grouped_lora()


class LoraWorkerExtension:
    """Methods that vLLM adds to its worker class; the engine calls them by name on every rank."""

    model_runner: Any  # the worker's own

    def tinkerbell_install(
        self, lora_name: str, lora_id: int, uri: str, path: str, size_bytes: int, layout: bytes
    ) -> str:
        """Installs the payload in the file at `path`, which must neither change nor go before `tinkerbell_drop`.

        `layout`: as Layout takes it. Answers with the name of a tensor that is not finite in this model's dtype,
        in which case nothing is installed, and otherwise with "".
        """
        manager: StoreLoRAManager = self.model_runner.lora_manager
        parsed = manager.layout(layout)
        adapter = StoredAdapter(lora_id, parsed, manager.buffers.open(path, size_bytes).view(parsed.dtype))
        return manager.install(LoRARequest(lora_name, lora_id, uri), adapter)

    def tinkerbell_reloads(self) -> int:
        """How often this worker has loaded an adapter again that vLLM had evicted."""
        return self.model_runner.lora_manager.reloads

    def tinkerbell_drop(self, uri: str, lora_id: int) -> None:
        """Forgets an adapter, if it is there. No request may run on it or wait for it."""
        self.model_runner.lora_manager.drop(uri, lora_id)
