"""Logits are float32 whatever the base model's dtype: within 1e-6 relative of float64's, where bfloat16 rounds to 4e-3.

The gradient of the hidden states is in the model's dtype: within 1e-2.
"""

import device
import numpy as np
import pytest
import torch
from engine_calls import random_datum
from processes import made_model

from service_common import checkpoint
from trainer_service.engine import Engine, Limits

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_with_the_output_weight(dtype: torch.dtype) -> None:
    from trainer_service.megatron import logprobs  # noqa: PLC0415  (Megatron)

    generator = torch.Generator().manual_seed(1)
    shapes = (37, 64), (300, 64), (37, 300)
    hidden, weight, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    hidden, weight = (each.to(device.of_engine(), dtype) for each in (hidden, weight))
    gradient = gradient.to(device.of_engine())
    exact = hidden.double().requires_grad_()
    expected = exact @ weight.double().t()
    expected.backward(gradient.double())
    hidden.requires_grad_()
    logits = logprobs._Float32Product.apply(hidden, weight)
    logits.backward(gradient)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() <= 1e-6 * expected.norm()
    assert hidden.grad.dtype == dtype
    assert (hidden.grad - exact.grad).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * exact.grad.norm()


@pytest.mark.parametrize("model", ["llama", "qwen2", "gemma2"])  # qwen2's are tied to the embedding, gemma2's capped
def test_a_bfloat16_models_logits_are_not_rounded(model: str) -> None:
    engine = Engine(device.of_engine(), Limits())
    engine.dtype = torch.bfloat16
    found = checkpoint.resolve(str(made_model(f"tiny-{model}", "tiny", model)))
    engine.load_base_model(found, lambda stage: None)
    from trainer_service.megatron.model import PackedSequence  # noqa: PLC0415  (after the engine has loaded)

    datum = random_datum(np.random.default_rng(2), 20, found.vocab_size)
    with torch.no_grad():
        logits = engine._model.logits([PackedSequence(None, datum.tokens, datum.target_tokens)])
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).float().mean() > 0.9
