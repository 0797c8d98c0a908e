"""From a payload straight into the slots of vLLM's LoRA layers.

vLLM brings an adapter into a slot in four steps: it reads tensors from a folder, packs those of fused layers, scales
B in place, and clears and fills each layer's slot. Here a payload is copied into the slots as it is, B being scaled on
the way, in float32 and rounded once. Which adapter has which slot, and which one has to leave, remains vLLM's business.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import parse_fine_tuned_lora_name

from sampler_service.slot_copies import Copies, Copy
from service_common import device_memory
from service_common.lora import module_scale, path_of
from tinkerbell import tensors
from tinkerbell.v1 import common_pb2

if TYPE_CHECKING:
    from sampler_service.slot_kernels import CopyKernel


@dataclass(frozen=True)
class _Factor:
    """A tensor of the payload. `scale`: what it is multiplied by, which is 1 for an A."""

    name: str
    offset: int  # in elements
    shape: tuple[int, int]
    scale: float


class Layout:
    """Where a payload has which tensors. Adapters of one shape share it.

    dtype: of the payload. size: its length in elements. shapes: by name.
    """

    def __init__(self, serialized: bytes):
        """`serialized`: as tinkerbell.payload.layout makes it, of a manifest that was checked and is normalized."""
        manifest = common_pb2.AdapterManifest.FromString(serialized)
        self.dtype = getattr(torch, tensors.dtype_name(manifest.tensors[0].dtype))
        self.factors = [
            _Factor(
                spec.name,
                spec.offset // self.dtype.itemsize,
                (spec.shape[0], spec.shape[1]),
                module_scale(manifest.lora, path_of(spec.name)) if ".lora_B." in spec.name else 1.0,
            )
            for spec in manifest.tensors
        ]
        self.size = sum(math.prod(factor.shape) for factor in self.factors)
        self.shapes = {factor.name: factor.shape for factor in self.factors}
        self._largest_scale = max(factor.scale for factor in self.factors)

    def not_finite(self, payload: torch.Tensor, dtype: torch.dtype) -> str:
        """The first tensor that, scaled and rounded to `dtype`, has an infinity or a NaN; "" if none has."""
        least, most = torch.stack(torch.aminmax(payload)).tolist()  # a NaN anywhere makes both NaN
        if max(-least, most) * self._largest_scale <= torch.finfo(dtype).max:
            return ""
        for factor in self.factors:
            values = payload[factor.offset : factor.offset + math.prod(factor.shape)].float() * factor.scale
            if not values.to(dtype).isfinite().all():
                return factor.name
        return ""


class StoredAdapter(LoRAModel):
    """An adapter as it was pushed, in the guise in which vLLM's caches take one.

    on_device: its payload where the model is, when that happens to be there.
    """

    def __init__(self, lora_id: int, layout: Layout, buffer: torch.Tensor):
        """`buffer`: the payload in host memory, as uint8. It must not change."""
        super().__init__(lora_id, rank=0, loras={})  # nobody asks for either
        self.layout = layout
        self.on_device: torch.Tensor | None = None
        self._payload = buffer.view(layout.dtype)
        self._arriving: torch.cuda.Event | None = None

    @property
    def payload(self) -> torch.Tensor:
        """[layout.size] in host memory."""
        self.settle()
        return self._payload

    def fetch(self, payload: torch.Tensor) -> None:
        """Begins to fill the host memory from a GPU. Nobody else may write to `payload` any more."""
        self._arriving = device_memory.copy_to_host(payload, self._payload)

    def settle(self) -> None:
        """Waits until it is full."""
        if self._arriving:
            self._arriving.synchronize()
            self._arriving = None


class SlotManager(LRUCacheLoRAModelManager):
    """vLLM's bookkeeping of adapters and slots, with another way to fill a slot."""

    modules: dict[str, Any]  # vLLM's LoRA layers by name

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._shapes: list[dict[str, tuple[int, int]] | None] = [None] * self.lora_slots  # of what each slot has
        self._copying = functools.lru_cache(maxsize=64)(self._plan)  # by layout and slot
        self._places = functools.cache(self._places_of)

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, StoredAdapter):
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        """Gives an adapter a slot, if it has none; see vLLM."""
        if lora_id in self._active_adapters:
            return super().activate_adapter(lora_id)
        adapter = self._registered_adapters[lora_id]
        layers = self.modules
        if isinstance(adapter, StoredAdapter):
            self.modules = {}  # it finds the slot, and then no layer to fill
        try:
            super().activate_adapter(lora_id)
        finally:
            self.modules = layers
        slot = self.lora_index_to_id.index(lora_id)
        if isinstance(adapter, StoredAdapter):
            self._fill(slot, adapter)
        else:
            self._shapes[slot] = None
        return True

    def _fill(self, slot: int, adapter: StoredAdapter) -> None:
        if self._shapes[slot] != adapter.layout.shapes:  # something would stay around or beside the new one
            self._shapes[slot] = None
            torch._foreach_zero_(self._places(slot))
        payload = adapter.payload.to(self.device) if adapter.on_device is None else adapter.on_device
        self._copying(adapter.layout, slot).fill(payload)
        self._shapes[slot] = adapter.layout.shapes

    def _places_of(self, slot: int) -> list[torch.Tensor]:
        """All that a slot is made of; hundreds of views, which take a millisecond to make."""
        layers = self.modules.values()
        return [stack[slot] for layer in layers for stack in layer.lora_a_stacked + layer.lora_b_stacked]

    def _plan(self, layout: Layout, slot: int) -> "Copies | CopyKernel":
        copies = list(self._copies(layout, slot))
        if self.device.type != "cuda":
            return Copies(copies)
        from sampler_service.slot_kernels import CopyKernel  # noqa: PLC0415  (Triton)

        return CopyKernel(copies)

    def _copies(self, layout: Layout, slot: int) -> Iterator[Copy]:
        """What brings a payload, or this rank's part of it, into a slot."""
        factors: dict[tuple[str, bool], tuple[torch.Tensor | None, float]] = {}
        payload = torch.empty(layout.size, dtype=layout.dtype, device="meta")
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        for factor in layout.factors:
            path, is_a = parse_fine_tuned_lora_name(factor.name, mapper and mapper.get_unstacked_mapper())
            view = payload[factor.offset : factor.offset + math.prod(factor.shape)].view(factor.shape)
            factors[path, is_a] = (view, factor.scale)
        for name, layer in self.modules.items():
            fused = self.packed_modules.get(name, [name])
            for is_a, stacked in ((True, layer.lora_a_stacked), (False, layer.lora_b_stacked)):
                found = [factors.pop((path, is_a), (None, 1.0)) for path in fused]
                views = [view for view, _ in found]
                if layer.tp_size > 1 and any(view is not None for view in views):
                    cut = layer.slice_lora_a if is_a else layer.slice_lora_b
                    views = list(cut(views)) if len(fused) > 1 else [cut(views[0])]
                for part, (_, scale), slots in zip(views, found, stacked, strict=True):
                    if part is not None:
                        target = slots[slot, 0, : part.shape[0], : part.shape[1]]
                        yield Copy(int(part.storage_offset()), part.stride(0), scale, target)
        if factors:
            raise RuntimeError(f"vLLM has no LoRA layer for {next(iter(factors))[0]}")
