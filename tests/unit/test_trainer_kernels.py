"""The trainer's elementwise kernels and their gradients against autograd in float64; in Triton's interpreter without a
GPU. Tolerance: 1e-6 relative in float32, 1e-2 in bfloat16.
"""

import kernels
import pytest
import torch

from trainer_service.megatron import kernels as ours

TOKENS = 21
by_dtype = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), pytest.param(torch.bfloat16, 1e-2, marks=kernels.compiled_only)],
)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kernels.DEVICE, dtype)


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (result.double() - expected).norm() <= tolerance * expected.norm()


def assert_gradient(function, reference, x: torch.Tensor, tolerance: float) -> None:
    """`function` and `reference` agree, and so do their gradients."""
    exact = x.detach().double().requires_grad_()
    expected = reference(exact)
    x = x.requires_grad_()
    result = function(x)
    assert_close(result, expected, tolerance)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(x.device)
    result.backward(grad.to(x.dtype))
    expected.backward(grad.to(x.dtype).double())
    assert_close(x.grad, exact.grad, tolerance)


@by_dtype
def test_swiglu(dtype: torch.dtype, tolerance: float) -> None:
    x = random(TOKENS, 1, 2 * 1100, dtype=dtype)  # more than a block, and no multiple of it
    assert_gradient(ours._SwiGlu.apply, lambda x: torch.nn.functional.silu(x[..., :1100]) * x[..., 1100:], x, tolerance)


@by_dtype
@pytest.mark.parametrize("turned", [48, 32])
def test_rotation_of_all_or_some_channels(turned: int, dtype: torch.dtype, tolerance: float) -> None:
    """Of heads that lie in a wider tensor, as the queries do."""
    mixed = random(TOKENS, 2, 5, 48, dtype=dtype)
    angles = random(TOKENS, turned // 2, dtype=torch.float32, seed=1).repeat(1, 2)
    turns = torch.stack((angles.cos(), angles.sin()))

    def reference(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(torch.stack((x[..., : turned // 2], x[..., turned // 2 : turned]), -1))
        complex_turns = torch.complex(*turns[..., : turned // 2].double())[:, None, None]
        result = torch.view_as_real(pairs * complex_turns)
        return torch.cat((result[..., 0], result[..., 1], x[..., turned:]), -1)

    for heads in (slice(0, 3), slice(3, 4)):
        assert_gradient(
            lambda x, heads=heads: ours._Rotate.apply(x[:, :, heads], turns),
            lambda x, heads=heads: reference(x[:, :, heads]),
            mixed.clone(),
            tolerance,
        )
        plain = ours.rotate(mixed[:, :, heads].cpu(), turns.cpu(), interleaved=False)
        assert_close(plain, reference(mixed.double())[:, :, heads].cpu(), tolerance)
