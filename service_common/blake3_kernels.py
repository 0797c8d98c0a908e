"""BLAKE3 on a GPU, for payloads that are there.

O'Connor, Aumasson, Neves, Wilcox-O'Hearn, "BLAKE3: one function, fast everywhere", 2020
(https://github.com/BLAKE3-team/BLAKE3-specs). A payload is cut into chunks of 1 KiB, which are hashed independently of
each other: here one lane each. Their chaining values are the leaves of a tree, of which a program merges eight levels.
"""

import torch
import triton
import triton.language as tl

_CHUNK_BYTES = 1024
_BLOCK_BYTES = 64
_LANES = 128

# Fractional parts of the square roots of the first eight primes.
_IV0, _IV1, _IV2, _IV3 = map(tl.constexpr, (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A))
_IV4, _IV5, _IV6, _IV7 = map(tl.constexpr, (0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19))
_CHUNK_START = tl.constexpr(1)
_CHUNK_END = tl.constexpr(2)
_PARENT = tl.constexpr(4)
_ROOT = tl.constexpr(8)


@triton.jit
def _mix(a, b, c, d, x, y):
    """The paper's G. Sums are modulo 2^32: Triton must not look for overflows, as it does when it debugs."""
    a = tl.add(tl.add(a, b, False), x, False)
    d = d ^ a
    d = (d >> 16) | (d << 16)
    c = tl.add(c, d, False)
    b = b ^ c
    b = (b >> 12) | (b << 20)
    a = tl.add(tl.add(a, b, False), y, False)
    d = d ^ a
    d = (d >> 8) | (d << 24)
    c = tl.add(c, d, False)
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
    for _ in tl.static_range(7):
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
def _load_four(words):
    """The four words from each lane's place on: lanes are far from each other, so each had better load 16 bytes."""
    four = tl.load(words[:, None] + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["num_whole", "num_blocks", "num_chunks", "last_length"])
def _hash_chunks(words, rest, values, num_whole, num_blocks, num_chunks, last_length, LANES: tl.constexpr):
    """values[:, c] = chaining value of chunk c, or the hash if there is one chunk.

    The first `num_whole` chunks are in `words`; the other one, if any, in `rest`, with zeros up to its full size.
    """
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    chunk = tl.minimum(lane, num_chunks - 1)  # lanes too many repeat the last one
    blocks = tl.minimum(num_blocks - chunk * 16, 16)
    start = tl.where(chunk < num_whole, words + chunk.to(tl.int64) * 256, rest)
    root = tl.where(num_chunks == 1, _ROOT, 0)
    zero = tl.zeros((LANES,), tl.uint32)
    h0, h1, h2, h3 = zero + _IV0, zero + _IV1, zero + _IV2, zero + _IV3
    h4, h5, h6, h7 = zero + _IV4, zero + _IV5, zero + _IV6, zero + _IV7
    for block in range(tl.minimum(num_blocks, 16)):
        m0, m1, m2, m3 = _load_four(start + block * 16)
        m4, m5, m6, m7 = _load_four(start + block * 16 + 4)
        m8, m9, m10, m11 = _load_four(start + block * 16 + 8)
        m12, m13, m14, m15 = _load_four(start + block * 16 + 12)
        flags = tl.where(block == blocks - 1, _CHUNK_END + root, 0) + tl.where(block == 0, _CHUNK_START, 0)
        length = tl.where(chunk * 16 + block == num_blocks - 1, last_length, 64)
        n0, n1, n2, n3, n4, n5, n6, n7 = _compress(
            h0, h1, h2, h3, h4, h5, h6, h7,
            m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15,
            chunk.to(tl.uint32), length.to(tl.uint32), flags.to(tl.uint32),
        )  # fmt: skip
        h0, h1, h2, h3, h4, h5, h6, h7 = _choose(
            block < blocks, n0, n1, n2, n3, n4, n5, n6, n7, h0, h1, h2, h3, h4, h5, h6, h7
        )
    _store(values + lane, num_chunks, lane < num_chunks, h0, h1, h2, h3, h4, h5, h6, h7)


@triton.jit(do_not_specialize=["num_chunks", "num_values", "stride"])
def _merge(values, num_chunks, num_values, stride, LANES: tl.constexpr):
    """Merges each 2 * LANES of the chaining values values[:, i * stride], i < num_values, into the first of them."""
    first = tl.program_id(0) * 2 * LANES
    count = tl.minimum(num_values - first, 2 * LANES)
    lane = tl.arange(0, LANES)
    zero = tl.zeros((LANES,), tl.uint32)
    while count > 1:
        left = values + (first + 2 * lane) * stride
        exists, paired = 2 * lane < count, 2 * lane + 1 < count
        l0, l1, l2, l3, l4, l5, l6, l7 = _load(left, num_chunks, exists)
        r0, r1, r2, r3, r4, r5, r6, r7 = _load(left + stride, num_chunks, paired)
        flags = tl.where((tl.num_programs(0) == 1) & (count == 2), _PARENT + _ROOT, _PARENT)
        n0, n1, n2, n3, n4, n5, n6, n7 = _compress(
            zero + _IV0, zero + _IV1, zero + _IV2, zero + _IV3, zero + _IV4, zero + _IV5, zero + _IV6, zero + _IV7,
            l0, l1, l2, l3, l4, l5, l6, l7, r0, r1, r2, r3, r4, r5, r6, r7,
            zero, zero + 64, zero + flags.to(tl.uint32),
        )  # fmt: skip
        # An odd last one goes up as it is, which makes every left subtree as large as BLAKE3 wants it.
        n0, n1, n2, n3, n4, n5, n6, n7 = _choose(paired, n0, n1, n2, n3, n4, n5, n6, n7, l0, l1, l2, l3, l4, l5, l6, l7)
        tl.debug_barrier()  # what is overwritten now, all threads have read
        _store(values + (first + lane) * stride, num_chunks, exists, n0, n1, n2, n3, n4, n5, n6, n7)
        tl.debug_barrier()  # and what is read next, all have written
        count = (count + 1) // 2


@triton.jit
def _choose(condition, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return (
        tl.where(condition, a0, b0), tl.where(condition, a1, b1), tl.where(condition, a2, b2),
        tl.where(condition, a3, b3), tl.where(condition, a4, b4), tl.where(condition, a5, b5),
        tl.where(condition, a6, b6), tl.where(condition, a7, b7),
    )  # fmt: skip


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

    `payload`: flat and contiguous, of any dtype, at least one byte; ValueError otherwise. On the CPU it needs Triton's
    interpreter. Waits for the work on its device's current stream.
    """
    if payload.dim() != 1 or not payload.is_contiguous() or not payload.numel():
        raise ValueError(f"payload must be flat, contiguous and not empty, has shape {tuple(payload.shape)}")
    content = payload.view(torch.uint8)
    if content.data_ptr() % 4:
        content = content.clone()  # the kernel reads words
    size = len(content)
    num_chunks, num_blocks = triton.cdiv(size, _CHUNK_BYTES), triton.cdiv(size, _BLOCK_BYTES)
    num_whole, rest_size = divmod(size, _CHUNK_BYTES)
    words = rest = content[: size - rest_size].view(torch.uint32)
    if rest_size:
        rest = torch.nn.functional.pad(content[size - rest_size :], (0, _CHUNK_BYTES - rest_size)).view(torch.uint32)
    last_length = size - (num_blocks - 1) * _BLOCK_BYTES
    values = torch.empty(8, num_chunks, dtype=torch.uint32, device=content.device)
    with torch.cuda.device_of(content):  # where Triton launches
        grid = (triton.cdiv(num_chunks, _LANES),)
        _hash_chunks[grid](words, rest, values, num_whole, num_blocks, num_chunks, last_length, LANES=_LANES)
        num_values, stride = num_chunks, 1
        while num_values > 1:
            num_groups = triton.cdiv(num_values, 2 * _LANES)
            _merge[(num_groups,)](values, num_chunks, num_values, stride, LANES=_LANES)
            num_values, stride = num_groups, stride * 2 * _LANES
    return values[:, 0].cpu().numpy().tobytes()
