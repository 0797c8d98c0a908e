"""Samplers with everything but vLLM: the real servicer, registry and pushes over gRPC. For tests of publishing."""

import asyncio
import contextlib
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import save_file

from sampler_service.config import SamplerConfig
from sampler_service.lanes import Lanes
from sampler_service.sampler import Sampler
from sampler_service.server import SERVICE_NAME, SamplerServicer, add_to_server
from service_common import errors
from service_common.checkpoint import Checkpoint
from service_common.device_memory import DeviceMemoryError
from service_common.errors import ServiceError
from service_common.lora import tensor_shapes
from service_common.rpc import Server
from tinkerbell import payload
from tinkerbell.local import free_address
from tinkerbell.v1 import common_pb2
from trainer_service.metrics import Metrics
from trainer_service.publish.discovery import Discovery
from trainer_service.publish.publisher import Publisher
from trainer_service.publish.relays import Relays
from trainer_service.snapshot import Snapshot

HIDDEN = 8


def tiny_checkpoint(folder: Path) -> Checkpoint:
    """A Llama of one layer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": HIDDEN,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        f"model.layers.0.{block}.{module}.weight": torch.zeros(HIDDEN, HIDDEN)
        for block, modules in {
            "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj"),
        }.items()
        for module in modules
    }
    save_file(weights, folder / "model.safetensors")
    return Checkpoint("model", folder)


def snapshot(checkpoint: Checkpoint, content: int, step: int = 0) -> Snapshot:
    """Weights of an adapter, all of them this number, after so many steps."""
    lora = common_pb2.LoraConfig(rank=2, alpha=4, target_modules=["q_proj"])
    shapes = tensor_shapes(checkpoint, lora)
    manifest = payload.build_manifest(lora, shapes, common_pb2.DATA_TYPE_FLOAT32, checkpoint.fingerprint)
    data = bytearray(np.full(manifest.size_bytes // 4, content, np.float32))
    manifest.digest = payload.digest(manifest, data)
    return Snapshot(manifest, memoryview(data), step)


def scores(content: float, sequences) -> list[np.ndarray]:
    """What `FakeEngine` answers for an adapter of this content."""
    return [np.full(len(sequence) - 1, -content, np.float32) for sequence in sequences]


class SharedMemory:
    """Stands in for service_common.device_memory.SharedMemory, which needs a GPU, in one process with `FakeEngine`."""

    all: ClassVar[dict[bytes, torch.Tensor]] = {}
    lacking: ClassVar[str] = ""

    def __init__(self, size_bytes, device):
        if self.lacking:
            raise DeviceMemoryError(self.lacking)
        self.size_bytes = size_bytes
        self.handle = len(self.all).to_bytes(64)
        self.tensor = self.all[self.handle] = torch.zeros(size_bytes, dtype=torch.uint8)

    def free(self):
        self.all[self.handle] = torch.empty(0, dtype=torch.uint8)


class FakeEngine:
    """Scores every token with minus the adapter's content."""

    def __init__(self, device: str):
        self.info = SimpleNamespace(device=device, dtype=common_pb2.DATA_TYPE_FLOAT32, max_model_len=64)
        self.opened: dict[str, bytes] = {}
        self.unreachable = ""
        self.installed: dict[int, float] = {}
        self.refusal: ServiceError | None = None
        self.off_by = 0.0
        self.installing = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def install(self, version, memory_id):
        self.installing.set()
        await self.go.wait()
        if self.refusal:
            raise self.refusal
        if memory_id:
            version.payload.view[:] = SharedMemory.all[self.opened[memory_id]].numpy()[: version.payload.size_bytes]
        self.installed[version.lora_id] = float(np.frombuffer(version.payload.view[:4], np.float32)[0])

    async def settle(self, version):
        pass

    async def open_device_memory(self, memory_id, handle, size_bytes):
        if self.unreachable:
            raise errors.failed_precondition("CUDA_IPC_UNREACHABLE", self.unreachable)
        assert len(SharedMemory.all[handle]) == size_bytes
        self.opened[memory_id] = handle

    async def close_device_memory(self, memory_id):
        self.opened.pop(memory_id, None)

    def drop(self, version):
        del self.installed[version.lora_id]
        version.payload.close()

    async def score(self, tokens, version):
        return scores(self.installed[version.lora_id] + self.off_by, [tokens])[0]


class SamplerWorld:
    """One sampler that can die and come back, at an address of its own."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", cuda_ipc: bool = False, lanes: Lanes | None = None):
        self.address = free_address()
        self.lanes = lanes or Lanes("127.0.0.1", 0)
        self._checkpoint, self._device, self._cuda_ipc = checkpoint, device, cuda_ipc

    async def start(self) -> "SamplerWorld":
        """Comes up with nothing."""
        config = SamplerConfig(
            model="model",
            dtype="float32",
            tensor_parallel=1,
            max_rank=8,
            max_loras=4,
            keep_versions=2,
            max_sequences=64,
            max_model_len=None,
            kv_cache_bytes=0,
            gpu_memory_utilization=None,
            cuda_ipc=self._cuda_ipc,
            await_trainer=True,
        )
        self.engine = FakeEngine(self._device)
        self.sampler = Sampler(config, self._checkpoint, self.engine, SimpleNamespace(present=False), self.lanes)
        servicer = SamplerServicer()
        servicer.attach(self.sampler)
        self._server = Server(
            self.address,
            SERVICE_NAME,
            functools.partial(add_to_server, servicer),
        )
        await self._server.start()
        return self

    async def stop(self) -> None:
        """Goes down, in the middle of whatever it does."""
        self.sampler.device_memory.ending.set()
        await self._server.drain(0)
        for adapter_id in self.sampler.registry.adapters():
            self.sampler.registry.unload(adapter_id, 0)

    def live(self, adapter_id: str = "a") -> dict[int, float]:
        """Content by live version."""
        return {
            entry.version.version: self.engine.installed[entry.version.lora_id]
            for entry in self.sampler.registry.adapters().get(adapter_id, [])
        }


@contextlib.asynccontextmanager
async def publishing(worlds, used=0, reserved=None, adapter_ids="ab", cuda_ipc=None, relays=None):
    """A publisher to these samplers that looks after adapters a and b, or others with names of one letter."""

    async def reserve(adapter_id, version):
        if reserved is not None:
            reserved.append((adapter_id, version))

    publisher = Publisher(
        Discovery([world.address for world in worlds]), reserve, Metrics(), relays or Relays(0), cuda_ipc
    )
    for adapter_id in adapter_ids:
        publisher.manage(adapter_id, used)
    publisher.start()
    try:
        await publisher.data_type()
        yield publisher
    finally:
        await publisher.close()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
