"""A sampler on two ranks, with one slot: adapters of different shapes take turns in it, and each rank has its part.

Log-probabilities are within 1e-3 of those that Hugging Face and PEFT compute in float32, and further from the base's.
"""

import grpc
import numpy as np
import pytest
import torch
import transformers
from processes import start_sampler, wait_ready
from random_adapters import logprobs, peft_model, random_adapter_like

from service_common.checkpoint import Checkpoint
from service_common.lora import TARGET_MODULES
from tinkerbell import push, tensors
from tinkerbell.v1 import common_pb2, sampler_pb2, sampler_pb2_grpc

pytestmark = [pytest.mark.engine, pytest.mark.cpu_only]  # it would need two GPUs

TOLERANCE = 1e-3
TOKENS = [5, 17, 3, 99, 42, 7, 64, 11, 23, 31]
SHAPES = {
    "whole": common_pb2.LoraConfig(rank=8, alpha=16.0, target_modules=TARGET_MODULES),
    "patterned": common_pb2.LoraConfig(
        rank=4,
        alpha=8.0,
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"model.layers.0.self_attn.q_proj": 7, "model.layers.1.mlp.down_proj": 1},
        alpha_pattern={"model.layers.0.self_attn.o_proj": 3.0},
    ),
    "part": common_pb2.LoraConfig(rank=2, alpha=4.0, target_modules=["k_proj", "gate_proj"]),
}


async def test_adapters_of_any_shape_take_turns_in_a_slot(tiny_model) -> None:
    checkpoint = Checkpoint("model", tiny_model)
    adapters = {
        name: random_adapter_like(checkpoint, seed, lora, b_std=0.2) for seed, (name, lora) in enumerate(SHAPES.items())
    }
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    alone = logprobs(base, TOKENS)
    expected = {name: logprobs(peft_model(tiny_model, adapter), TOKENS) for name, adapter in adapters.items()}
    options = ("--dtype=float32", "--tensor-parallel=2", "--max-loras=1", "--max-rank=8", "--max-model-len=64")
    sampler = start_sampler(tiny_model, *options)
    try:
        wait_ready(sampler)
        async with grpc.aio.insecure_channel(sampler.address) as channel:
            stub = sampler_pb2_grpc.SamplerServiceStub(channel)
            for name, adapter in adapters.items():
                begin = sampler_pb2.PushBegin(adapter_id=name, version=1, manifest=adapter.manifest)
                await push.push(channel, begin, adapter.payload)
            for name in ("part", "whole", "patterned", "part", "patterned", "whole", "part"):
                request = sampler_pb2.ComputeLogprobsRequest(
                    adapter_id=name, sequences=[common_pb2.TokenSequence(tokens=TOKENS)]
                )
                (scores,) = (await stub.ComputeLogprobs(request)).logprobs
                np.testing.assert_allclose(tensors.decode(scores), expected[name], atol=TOLERANCE)
                assert np.abs(expected[name] - alone).max() > 10 * TOLERANCE
    finally:
        sampler.process.kill()
        sampler.process.wait()
