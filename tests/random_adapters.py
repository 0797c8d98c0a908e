"""Adapters with random weights, as payloads and as PEFT models."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from service_common.checkpoint import Checkpoint
from service_common.lora import TARGET_MODULES, tensor_shapes
from tinkerbell import payload
from tinkerbell.v1 import common_pb2, sampler_pb2


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors by PEFT name, in payload order, and what a push needs of them."""

    tensors: dict[str, np.ndarray]
    manifest: common_pb2.AdapterManifest
    payload: bytes

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray], lora: common_pb2.LoraConfig, fingerprint: str) -> "Adapter":
        """Lays out and signs float32 tensors."""
        manifest = payload.build_manifest(
            lora, [(name, tensor.shape) for name, tensor in tensors.items()], common_pb2.DATA_TYPE_FLOAT32, fingerprint
        )
        data = b"".join(tensor.tobytes() for tensor in tensors.values())
        manifest.digest = payload.digest(manifest, data)
        return cls(tensors, manifest, data)


def random_adapter(
    checkpoint: Checkpoint, seed: int, rank: int = 8, alpha: float = 16.0, b_std: float = 0.02
) -> Adapter:
    """All modules, float32, B not zero."""
    lora = common_pb2.LoraConfig(rank=rank, alpha=alpha, target_modules=TARGET_MODULES)
    return random_adapter_like(checkpoint, seed, lora, b_std)


def random_adapter_like(checkpoint: Checkpoint, seed: int, lora: common_pb2.LoraConfig, b_std: float = 0.02) -> Adapter:
    """Of this shape, every field of which is set; float32, B not zero."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(checkpoint, lora):
        std = 1 / np.sqrt(shape[1]) if ".lora_A." in name else b_std
        tensors[name] = (generator.standard_normal(shape) * std).astype(np.float32)
    return Adapter.of(tensors, lora, checkpoint.fingerprint)


def push_frames(adapter: Adapter, adapter_id: str, version: int) -> Iterator[sampler_pb2.PushAdapterRequest]:
    """BEGIN, CHUNK..., COMMIT."""
    yield sampler_pb2.PushAdapterRequest(
        begin=sampler_pb2.PushBegin(adapter_id=adapter_id, version=version, manifest=adapter.manifest)
    )
    for chunk in payload.chunks(adapter.payload):
        yield sampler_pb2.PushAdapterRequest(chunk=chunk)
    yield sampler_pb2.PushAdapterRequest(commit=sampler_pb2.PushCommit())


def peft_model(folder: Path, adapter: Adapter) -> torch.nn.Module:
    """Hugging Face's model with the adapter on it, in float32."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = adapter.manifest.lora
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
    )
    model = peft.get_peft_model(base, config)
    weights = {name: torch.from_numpy(tensor) for name, tensor in adapter.tensors.items()}
    loaded = peft.set_peft_model_state_dict(model, weights)
    assert not loaded.unexpected_keys
    return model.eval()


@torch.no_grad()
def logprobs(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """float32 [len(tokens) - 1]: log p(tokens[i + 1] | tokens[0..i])."""
    ids = torch.tensor([tokens])
    scores = model(ids).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[:, 0].numpy()
