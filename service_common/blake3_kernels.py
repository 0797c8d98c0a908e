"""BLAKE3 on a GPU, for payloads that are there.

O'Connor, Aumasson, Neves, Wilcox-O'Hearn, "BLAKE3: one function, fast everywhere", 2020
(https://github.com/BLAKE3-team/BLAKE3-specs). A payload is cut into chunks of 1 KiB, which are hashed independently of
each other: here one lane each. Their chaining values are the leaves of a tree, whose levels follow one after the other.
"""

import torch
import triton
import triton.language as tl

_CHUNK_BYTES = 1024
_BLOCK_BYTES = 64
_LANES = 128

# Fractional parts of the square roots of the first eight primes.
_IV = tuple(
    tl.constexpr(word)
    for word in (
        0x6A09E667,
        0xBB67AE85,
        0x3C6EF372,
        0xA54FF53A,
        0x510E527F,
        0x9B05688C,
        0x1F83D9AB,
        0x5BE0CD19,
    )
)
_IV0, _IV1, _IV2, _IV3, _IV4, _IV5, _IV6, _IV7 = _IV
_CHUNK_START = tl.constexpr(1)
_CHUNK_END = tl.constexpr(2)
_PARENT = tl.constexpr(4)
_ROOT = tl.constexpr(8)


@triton.jit
def _mix(a, b, c, d, x, y):
    a = a + b + x
    d = d ^ a
    d = (d >> 16) | (d << 16)
    c = c + d
    b = b ^ c
    b = (b >> 12) | (b << 20)
    a = a + b + y
    d = d ^ a
    d = (d >> 8) | (d << 24)
    c = c + d
    b = b ^ c
    b = (b >> 7) | (b << 25)
    return a, b, c, d


@triton.jit
def _compress(
    h0, h1, h2, h3, h4, h5, h6, h7,
    m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15,
    counter, length, flags,
):  # fmt: skip
    """The next chaining value, from the last one and a block of sixteen words: one uint32 per lane, each of them."""
    v0, v1, v2, v3, v4, v5, v6, v7 = h0, h1, h2, h3, h4, h5, h6, h7
    zero = h0 ^ h0
    v8, v9, v10, v11 = zero + _IV0, zero + _IV1, zero + _IV2, zero + _IV3
    v12, v13, v14, v15 = zero + counter, zero, zero + length, zero + flags
    for _ in range(7):  # unrolled it takes half a minute to compile
        v0, v4, v8, v12 = _mix(v0, v4, v8, v12, m0, m1)
        v1, v5, v9, v13 = _mix(v1, v5, v9, v13, m2, m3)
        v2, v6, v10, v14 = _mix(v2, v6, v10, v14, m4, m5)
        v3, v7, v11, v15 = _mix(v3, v7, v11, v15, m6, m7)
        v0, v5, v10, v15 = _mix(v0, v5, v10, v15, m8, m9)
        v1, v6, v11, v12 = _mix(v1, v6, v11, v12, m10, m11)
        v2, v7, v8, v13 = _mix(v2, v7, v8, v13, m12, m13)
        v3, v4, v9, v14 = _mix(v3, v4, v9, v14, m14, m15)
        m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15 = (
            m2, m6, m3, m10, m7, m0, m4, m13, m1, m11, m12, m5, m9, m14, m15, m8,
        )  # fmt: skip
    return v0 ^ v8, v1 ^ v9, v2 ^ v10, v3 ^ v11, v4 ^ v12, v5 ^ v13, v6 ^ v14, v7 ^ v15


@triton.jit
def _hash_chunks(words, values, num_blocks, num_chunks, last_length, LANES: tl.constexpr):
    chunk = tl.program_id(0) * LANES + tl.arange(0, LANES)
    blocks = tl.minimum(num_blocks - chunk * 16, 16)  # of each chunk; not above 0 for lanes that have none
    zero = tl.zeros([LANES], tl.uint32)
    h0, h1, h2, h3 = zero + _IV0, zero + _IV1, zero + _IV2, zero + _IV3
    h4, h5, h6, h7 = zero + _IV4, zero + _IV5, zero + _IV6, zero + _IV7
    for block in range(16):
        here = block < blocks
        start = words + chunk.to(tl.int64) * 256 + block * 16
        last = block == blocks - 1
        flags = tl.where(last, _CHUNK_END, 0) + tl.where(block == 0, _CHUNK_START, 0)
        flags += tl.where(last & (num_chunks == 1), _ROOT, 0)
        length = tl.where(chunk * 16 + block == num_blocks - 1, last_length, 64)
        n0, n1, n2, n3, n4, n5, n6, n7 = _compress(
            h0, h1, h2, h3, h4, h5, h6, h7,
            tl.load(start, here, 0), tl.load(start + 1, here, 0), tl.load(start + 2, here, 0),
            tl.load(start + 3, here, 0), tl.load(start + 4, here, 0), tl.load(start + 5, here, 0),
            tl.load(start + 6, here, 0), tl.load(start + 7, here, 0), tl.load(start + 8, here, 0),
            tl.load(start + 9, here, 0), tl.load(start + 10, here, 0), tl.load(start + 11, here, 0),
            tl.load(start + 12, here, 0), tl.load(start + 13, here, 0), tl.load(start + 14, here, 0),
            tl.load(start + 15, here, 0),
            chunk.to(tl.uint32), length.to(tl.uint32), flags.to(tl.uint32),
        )  # fmt: skip
        h0, h1, h2, h3 = tl.where(here, n0, h0), tl.where(here, n1, h1), tl.where(here, n2, h2), tl.where(here, n3, h3)
        h4, h5, h6, h7 = tl.where(here, n4, h4), tl.where(here, n5, h5), tl.where(here, n6, h6), tl.where(here, n7, h7)
    _store(values + chunk, num_chunks, chunk < num_chunks, h0, h1, h2, h3, h4, h5, h6, h7)


@triton.jit
def _merge(values, parents, num_values, num_parents, LANES: tl.constexpr):
    parent = tl.program_id(0) * LANES + tl.arange(0, LANES)
    exists = parent < num_parents
    left = values + parent * 2
    paired = exists & (parent * 2 + 1 < num_values)
    l0, l1, l2, l3, l4, l5, l6, l7 = _load(left, num_values, exists)
    r0, r1, r2, r3, r4, r5, r6, r7 = _load(left + 1, num_values, paired)
    zero = l0 ^ l0
    flags = tl.where(num_parents == 1, _PARENT + _ROOT, _PARENT)
    n0, n1, n2, n3, n4, n5, n6, n7 = _compress(
        zero + _IV0, zero + _IV1, zero + _IV2, zero + _IV3, zero + _IV4, zero + _IV5, zero + _IV6, zero + _IV7,
        l0, l1, l2, l3, l4, l5, l6, l7, r0, r1, r2, r3, r4, r5, r6, r7,
        zero, zero + 64, zero + flags.to(tl.uint32),
    )  # fmt: skip
    # An odd last one goes up as it is, which makes every left subtree as large as BLAKE3 wants it.
    n0, n1, n2, n3 = (
        tl.where(paired, n0, l0),
        tl.where(paired, n1, l1),
        tl.where(paired, n2, l2),
        tl.where(paired, n3, l3),
    )
    n4, n5, n6, n7 = (
        tl.where(paired, n4, l4),
        tl.where(paired, n5, l5),
        tl.where(paired, n6, l6),
        tl.where(paired, n7, l7),
    )
    _store(parents + parent, num_parents, exists, n0, n1, n2, n3, n4, n5, n6, n7)


@triton.jit
def _load(values, stride, mask):
    return (
        tl.load(values, mask, 0), tl.load(values + stride, mask, 0), tl.load(values + 2 * stride, mask, 0),
        tl.load(values + 3 * stride, mask, 0), tl.load(values + 4 * stride, mask, 0),
        tl.load(values + 5 * stride, mask, 0), tl.load(values + 6 * stride, mask, 0),
        tl.load(values + 7 * stride, mask, 0),
    )  # fmt: skip


@triton.jit
def _store(values, stride, mask, h0, h1, h2, h3, h4, h5, h6, h7):
    tl.store(values, h0, mask)
    tl.store(values + stride, h1, mask)
    tl.store(values + 2 * stride, h2, mask)
    tl.store(values + 3 * stride, h3, mask)
    tl.store(values + 4 * stride, h4, mask)
    tl.store(values + 5 * stride, h5, mask)
    tl.store(values + 6 * stride, h6, mask)
    tl.store(values + 7 * stride, h7, mask)


def payload_hash(payload: torch.Tensor) -> bytes:
    """The 32-byte BLAKE3 of a tensor's memory, computed where it is; as `blake3.blake3(...).digest()`.

    `payload`: flat and contiguous, of any dtype, not empty. Waits for the work on its device's current stream.
    """
    content = payload.view(torch.uint8)
    size = len(content)
    num_chunks, num_blocks = triton.cdiv(size, _CHUNK_BYTES), triton.cdiv(size, _BLOCK_BYTES)
    if size % _BLOCK_BYTES:
        content = torch.nn.functional.pad(content, (0, num_blocks * _BLOCK_BYTES - size))
    words = content.view(torch.uint32)
    values = torch.empty(8, num_chunks, dtype=torch.uint32, device=content.device)
    last_length = size - (num_blocks - 1) * _BLOCK_BYTES
    grid = (triton.cdiv(num_chunks, _LANES),)
    _hash_chunks[grid](words, values, num_blocks, num_chunks, last_length, _LANES)
    while (count := values.shape[1]) > 1:
        parents = torch.empty(8, triton.cdiv(count, 2), dtype=torch.uint32, device=content.device)
        _merge[(triton.cdiv(parents.shape[1], _LANES),)](values, parents, count, parents.shape[1], _LANES)
        values = parents
    return values.cpu().numpy().tobytes()
