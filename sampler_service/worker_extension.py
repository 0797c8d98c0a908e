"""What runs inside each vLLM worker: adapters from memory instead of from disk.

vLLM loads an adapter from a folder, and offers no other way. Its loader stays as it is; the two functions that it
reads a folder with answer from a store in the worker's memory when the path is one of ours. The store is the truth,
and vLLM's caches above it may evict and load again as they like.
"""

import inspect
import mmap
from typing import Any

import torch
import vllm.lora.worker_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.platforms import current_platform

from sampler_service import cpu_lora
from sampler_service.versions import URI_PREFIX

# uri -> (PEFT's adapter_config, tensors by PEFT name)
_store: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}


class _StoredPEFTHelper(PEFTHelper):
    @classmethod
    def from_local_dir(cls, lora_path, *args, **kwargs):
        if not lora_path.startswith(URI_PREFIX):
            return PEFTHelper.from_local_dir(lora_path, *args, **kwargs)
        if lora_path not in _store:
            raise FileNotFoundError(lora_path)
        return PEFTHelper.from_dict(_store[lora_path][0])


class _StoredLoRAModel(LoRAModel):
    loads = 0  # for the first time or again

    @classmethod
    def from_local_checkpoint(cls, lora_dir, expected_lora_modules, **kwargs):
        if not lora_dir.startswith(URI_PREFIX):
            return super().from_local_checkpoint(lora_dir, expected_lora_modules, **kwargs)
        _StoredLoRAModel.loads += 1
        accepted = inspect.signature(LoRAModel.from_lora_tensors).parameters
        return cls.from_lora_tensors(
            tensors=_store[lora_dir][1], **{name: value for name, value in kwargs.items() if name in accepted}
        )


vllm.lora.worker_manager.PEFTHelper = _StoredPEFTHelper
if current_platform.is_cpu():
    cpu_lora.use_grouped_lora()


class LoraWorkerExtension:
    """Methods that vLLM adds to its worker class; the engine calls them by name on every rank."""

    model_runner: Any  # the worker's own

    def tinkerbell_stage(
        self,
        uri: str,
        path: str,
        size_bytes: int,
        rank: int,
        alpha: float,
        specs: list[tuple[str, str, list[int], int]],
    ) -> tuple[int, str]:
        """Copies a payload into the store; `specs` are (PEFT name, dtype, shape, offset in bytes).

        Answers with the number of tensors it has stored, and the name of one that is not finite in this model's
        dtype, in which case it stores nothing.
        """
        manager = self.model_runner.lora_manager
        manager._lora_model_cls = _StoredLoRAModel
        lora_dtype = manager.lora_config.lora_dtype
        tensors = {}
        with open(path, "rb") as file:
            # A private mapping: PyTorch wants to be able to write, and nobody must.
            buffer = mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_COPY)
        for name, dtype, shape, offset in specs:
            count = torch.Size(shape).numel()
            tensor = torch.frombuffer(buffer, dtype=getattr(torch, dtype), count=count, offset=offset).view(shape)
            if ".lora_B." in name:
                # Folded in once, in float32, since vLLM would multiply in the rounded dtype and in place.
                tensor = tensor.float() * (alpha / rank)
            tensor = tensor.to(lora_dtype, copy=True)
            if not tensor.isfinite().all():
                return 0, name
            tensors[name] = tensor
        modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
        # alpha = rank is a scale of 1: nothing left for vLLM to multiply.
        _store[uri] = ({"r": rank, "lora_alpha": rank, "target_modules": modules}, tensors)
        return len(tensors), ""

    def tinkerbell_loads(self) -> int:
        """How often vLLM has loaded an adapter from the store of this worker."""
        return _StoredLoRAModel.loads

    def tinkerbell_drop(self, uri: str, lora_id: int) -> None:
        """Forgets an adapter, if it is there. No request may run on it or wait for it."""
        _store.pop(uri, None)
        self.model_runner.lora_manager.remove_adapter(lora_id)
