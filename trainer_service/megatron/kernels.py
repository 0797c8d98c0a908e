"""Elementwise parts of a decoder layer as one GPU kernel each, with their gradients; elsewhere as PyTorch operations.

Every product is taken in float32 and rounded once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

_BLOCK = 1024
_BLOCK_TOKENS = 16


@triton.jit
def _swiglu(x, y, num_features, BLOCK: tl.constexpr):
    """y[t] = silu(x[t, :features]) * x[t, features:]"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < num_features
    place = x + row * 2 * num_features + column
    gate = tl.load(place, exists).to(tl.float32)
    up = tl.load(place + num_features, exists).to(tl.float32)
    tl.store(y + row * num_features + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), exists)


@triton.jit
def _swiglu_gradient(x, grad_y, grad_x, num_features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < num_features
    place = row * 2 * num_features + column
    gate = tl.load(x + place, exists).to(tl.float32)
    up = tl.load(x + place + num_features, exists).to(tl.float32)
    grad = tl.load(grad_y + row * num_features + column, exists).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad_x + place, grad_gate.to(grad_x.dtype.element_ty), exists)
    tl.store(grad_x + place + num_features, (grad * gate * sigmoid).to(grad_x.dtype.element_ty), exists)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        num_features = x.size(-1) // 2
        y = x.new_empty(*x.shape[:-1], num_features)
        _swiglu[x.numel() // x.size(-1), triton.cdiv(num_features, _BLOCK)](x, y, num_features, BLOCK=_BLOCK)
        return y

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        num_features = x.size(-1) // 2
        grad_x = torch.empty_like(x)
        _swiglu_gradient[x.numel() // x.size(-1), triton.cdiv(num_features, _BLOCK)](
            x, grad_y.contiguous(), grad_x, num_features, BLOCK=_BLOCK
        )
        return grad_x


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [..., F], of `x` [..., 2 F], which has gate before up."""
    if x.is_cuda:
        return _SwiGlu.apply(x.contiguous())
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _rotate(
    x,
    y,
    turns,
    num_tokens,
    token_stride,
    group_stride,
    head_stride,
    num_heads,
    size,
    num_turned,
    SIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One group's heads; y is contiguous. Channel c < half is turned with channel c + half."""
    group = tl.program_id(1)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    half = num_turned // 2
    channel = tl.arange(0, BLOCK_HALF)[None, :]
    exists = (token < num_tokens) & (channel < half)
    angle = turns + token * num_turned + channel
    cos = tl.load(angle, exists)
    sin = tl.load(angle + num_tokens * num_turned, exists) * SIGN
    for head in range(num_heads):
        source = x + token * token_stride + group * group_stride + head * head_stride
        target = y + (token * tl.num_programs(1) * num_heads + group * num_heads + head) * size
        first = tl.load(source + channel, exists).to(tl.float32)
        second = tl.load(source + half + channel, exists).to(tl.float32)
        tl.store(target + channel, (first * cos - second * sin).to(y.dtype.element_ty), exists)
        tl.store(target + half + channel, (second * cos + first * sin).to(y.dtype.element_ty), exists)
        if BLOCK_REST > 0:
            rest = num_turned + tl.arange(0, BLOCK_REST)[None, :]
            kept = (token < num_tokens) & (rest < size)
            tl.store(target + rest, tl.load(source + rest, kept), kept)


def _rotated(x: torch.Tensor, turns: torch.Tensor, sign: int) -> torch.Tensor:
    num_tokens, groups, num_heads, size = x.shape
    num_turned = turns.size(-1)
    y = x.new_empty(x.shape)
    _rotate[triton.cdiv(num_tokens, _BLOCK_TOKENS), groups](
        x,
        y,
        turns,
        num_tokens,
        *x.stride()[:3],
        num_heads,
        size,
        num_turned,
        SIGN=sign,
        BLOCK_T=_BLOCK_TOKENS,
        BLOCK_HALF=triton.next_power_of_2(num_turned // 2),
        BLOCK_REST=0 if size == num_turned else triton.next_power_of_2(size - num_turned),
    )
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        ctx.turns = turns
        return _rotated(x, turns, 1)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor):
        return _rotated(grad_y.contiguous(), ctx.turns, -1), None


def rotate(x: torch.Tensor, turns: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of `x` [T, groups, heads, D], whose channels are contiguous, by `turns`: float32 [2, T, R],
    cosines and sines for the first R channels of every head.

    A channel is turned with the one R / 2 after it, or, if `interleaved`, with its neighbour.
    """
    if x.is_cuda and not interleaved:
        return _Rotate.apply(x, turns)
    cos, sin = turns[:, :, None, None]
    turned, rest = x.split([turns.size(-1), x.size(-1) - turns.size(-1)], dim=-1)
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
    return torch.cat(((turned * cos + other * sin).to(x.dtype), rest), dim=-1)
