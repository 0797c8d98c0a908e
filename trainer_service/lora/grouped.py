"""The products of `products.py` for a GPU: one kernel launch serves all adapters of a pass.

Which tokens belong to which adapter, and where its matrices lie, is data on the device: a launch depends on neither, so
it can be part of a CUDA graph. The kernels read the arenas' float32 weights themselves, round them to the activations'
dtype on the way into the matrix product, and add gradients to the arenas in float32.

The activations of a module are columns of the layer's input or output: `groups` times `span` of them, `stride` apart.
A factor is a matrix [rank, features]: A is stored like that, B the other way round.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl

from trainer_service.lora.arena import Arena, Factor
from trainer_service.lora.products import Batch, Features, Key, Layer, Products, Segment, no_adapters

# Tokens of one adapter, and features of one module, that a program works on at a time.
TILE_ROWS = 64
_TILE_FEATURES = 128
_STEP_FEATURES = 64
_MAX_BLOCK_RANKS = 64
# Programs that keep a large GPU busy, two for each of its multiprocessors.
_PROGRAMS = 264
# What `Tables.factors` has of each factor: address of the weights, of the gradient, rank, place of the first rank among
# the columns of x A^T, scale (the bits of a float32).
# The sixth keeps every factor's entry aligned to 16 bytes.
_FIELDS = 6
# What `_Side.modules` has of each module: groups, span, stride, start, number of its first tile.
_GEOMETRY = 5


@triton.jit
def _module_of(modules, tile, NUM_MODULES: tl.constexpr, GEOMETRY: tl.constexpr):
    module = 0
    for other in tl.static_range(1, NUM_MODULES):
        module += (tile >= tl.load(modules + other * GEOMETRY + 4)).to(tl.int32)
    return module


@triton.jit
def _columns_of(module, tile, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Of a module's tile: its columns of the activations, its features, and which of them exist."""
    span = tl.load(module + 1)
    if ALIGNED:
        span = tl.multiple_of(span, 16)
    tiles = tl.cdiv(span, BLOCK)
    group, inside = tile // tiles, tile % tiles * BLOCK
    column = group * tl.load(module + 2) + tl.load(module + 3) + inside
    feature = group * span + inside
    if ALIGNED:
        column, feature = tl.multiple_of(column, 16), tl.multiple_of(feature, 16)
    offsets = tl.arange(0, BLOCK)
    return column + offsets, feature + offsets, inside + offsets < span


@triton.jit
def _rank_of(factor, slot, RANKS_ALIGNED: tl.constexpr):
    """A factor's rank, 0 if there is none, and the place of its first rank among the columns of x A^T."""
    rank, place = tl.load(factor + 2, slot >= 0, 0).to(tl.int32), tl.load(factor + 3, slot >= 0, 0).to(tl.int32)
    if RANKS_ALIGNED:
        rank, place = tl.multiple_of(rank, 8), tl.multiple_of(place, 8)
    return rank, place


@triton.jit
def _elements_of(address, ranks, features, rank, module, RANKS_FIRST: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a factor's elements lie; one of `ranks` and `features` is a column, the other a row."""
    base = tl.load(address).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    if RANKS_FIRST:
        num_features = tl.load(module) * tl.load(module + 1)
        if ALIGNED:
            num_features = tl.multiple_of(num_features, 16)
        return base + ranks * num_features + features
    return base + features * rank + ranks


@triton.jit(do_not_specialize=["num_slots"])
def _shrink(
    x,
    low,
    factors,
    modules,
    tiles,
    x_stride,
    low_stride,
    split_stride,
    num_slots,
    RANKS_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANKS_ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GEOMETRY: tl.constexpr,
):
    """low[t, rank] = scale * sum over features of x[t, feature] * W[rank, feature], or a part of it for each split."""
    tile = tl.program_id(0)
    module = tl.program_id(1) // NUM_BLOCKS
    block = tl.program_id(1) % NUM_BLOCKS
    split = tl.program_id(2)
    slot, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    factor = factors + (module * num_slots + slot) * FIELDS
    rank, place = _rank_of(factor, slot, RANKS_ALIGNED)
    if (first < end) & (block * BLOCK_R < rank):
        geometry = modules + module * GEOMETRY
        groups, span = tl.load(geometry), tl.load(geometry + 1)
        rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        ranks = block * BLOCK_R + tl.arange(0, BLOCK_R)
        result = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for step in range(split, groups * tl.cdiv(span, BLOCK_K), SPLITS):
            columns, features, exists = _columns_of(geometry, step, BLOCK_K, ALIGNED)
            part = tl.load(
                x + rows[:, None] * x_stride + columns[None, :], (rows < end)[:, None] & exists[None, :], other=0.0
            )
            weight = tl.load(
                _elements_of(factor, ranks[None, :], features[:, None], rank, geometry, RANKS_FIRST, ALIGNED),
                (ranks < rank)[None, :] & exists[:, None],
                other=0.0,
            )
            result = tl.dot(part, weight.to(part.dtype), result, input_precision="ieee")
        result *= tl.load(factor + 4).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(
            low + split * split_stride + rows[:, None] * low_stride + (place + ranks)[None, :],
            result.to(low.dtype.element_ty),
            (rows < end)[:, None] & (ranks < rank)[None, :],
        )


@triton.jit
def _sum_splits(parts, total, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """total[i] = sum over splits of parts[split, i]."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        result += tl.load(parts + split * size + places, places < size, other=0.0)
    tl.store(total + places, result.to(total.dtype.element_ty), places < size)


@triton.jit(do_not_specialize=["num_slots"])
def _expand(
    y,
    low,
    factors,
    modules,
    tiles,
    y_stride,
    low_stride,
    num_slots,
    RANKS_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANKS_ALIGNED: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr,
    GEOMETRY: tl.constexpr,
):
    """y[t, feature] = scale * sum over ranks of low[t, rank] * W[rank, feature]."""
    tile = tl.program_id(0)
    slot, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    module = _module_of(modules, tl.program_id(1), NUM_MODULES, GEOMETRY)
    factor = factors + (module * num_slots + slot) * FIELDS
    rank, place = _rank_of(factor, slot, RANKS_ALIGNED)
    if first < end:
        geometry = modules + module * GEOMETRY
        columns, features, exists = _columns_of(geometry, tl.program_id(1) - tl.load(geometry + 4), BLOCK_N, ALIGNED)
        rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        result = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for block in range(0, rank, BLOCK_R):
            ranks = block + tl.arange(0, BLOCK_R)
            part = tl.load(
                low + rows[:, None] * low_stride + (place + ranks)[None, :],
                (rows < end)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            weight = tl.load(
                _elements_of(factor, ranks[:, None], features[None, :], rank, geometry, RANKS_FIRST, ALIGNED),
                (ranks < rank)[:, None] & exists[None, :],
                other=0.0,
            )
            result = tl.dot(part, weight.to(part.dtype), result, input_precision="ieee")
        result *= tl.load(factor + 4, slot >= 0, 0).to(tl.int32).to(tl.float32, bitcast=True)
        mask = (rows < end)[:, None] & exists[None, :]
        tl.store(y + rows[:, None] * y_stride + columns[None, :], result.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_slots"])
def _accumulate(
    x,
    low,
    factors,
    modules,
    slots,
    x_stride,
    low_stride,
    num_slots,
    RANKS_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANKS_ALIGNED: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr,
    GEOMETRY: tl.constexpr,
):
    """gradient[rank, feature] += scale * sum over an adapter's tokens of low[t, rank] * x[t, feature]."""
    slot = tl.program_id(2)
    block = tl.program_id(1)
    first, end = tl.load(slots + 2 * slot), tl.load(slots + 2 * slot + 1)
    module = _module_of(modules, tl.program_id(0), NUM_MODULES, GEOMETRY)
    factor = factors + (module * num_slots + slot) * FIELDS
    rank, place = _rank_of(factor, slot, RANKS_ALIGNED)
    if (first < end) & (block * BLOCK_R < rank):
        geometry = modules + module * GEOMETRY
        columns, features, exists = _columns_of(geometry, tl.program_id(0) - tl.load(geometry + 4), BLOCK_N, ALIGNED)
        ranks = block * BLOCK_R + tl.arange(0, BLOCK_R)
        result = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for row in range(first, end, BLOCK_T):
            rows = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
            left = tl.load(
                low + rows[None, :] * low_stride + (place + ranks)[:, None],
                (rows < end)[None, :] & (ranks < rank)[:, None],
                other=0.0,
            )
            right = tl.load(
                x + rows[:, None] * x_stride + columns[None, :], (rows < end)[:, None] & exists[None, :], other=0.0
            )
            result = tl.dot(left, right, result, input_precision="ieee")
        result *= tl.load(factor + 4).to(tl.int32).to(tl.float32, bitcast=True)
        places = _elements_of(factor + 1, ranks[:, None], features[None, :], rank, geometry, RANKS_FIRST, ALIGNED)
        mask = (ranks < rank)[:, None] & exists[None, :]
        tl.store(places, tl.load(places, mask) + result, mask)


@dataclass(frozen=True)
class Ranks:
    """What the ranks of a pass's modules have in common, which the kernels are compiled for."""

    most: int  # a power of two
    are_aligned: bool  # all of them, to what a GPU can load at once

    @classmethod
    def of(cls, arenas: Iterable[Arena]) -> "Ranks":
        """Of all adapters of a pass."""
        ranks = {rank for arena in arenas for adapter in arena.linears.values() for rank in adapter.ranks}
        return cls(triton.next_power_of_2(max(16, *ranks, 0)), all(rank % 8 == 0 for rank in ranks))


@dataclass(frozen=True)
class _Side:
    """A layer's input, which the As of an adapter multiply together, or its output, where each module has its B."""

    modules: torch.Tensor  # int32 [modules, _GEOMETRY]
    num_modules: int
    num_columns: int  # of the activations
    num_tiles: int
    num_steps: int  # of _STEP_FEATURES, in the largest module
    is_aligned: bool
    first_factor: int
    ranks_first: bool


def _side(parts: Sequence[Features], first_factor: int, ranks_first: bool, device: torch.device) -> _Side:
    tiles = [part.groups * triton.cdiv(part.stop - part.start, _TILE_FEATURES) for part in parts]
    firsts = [0, *itertools.accumulate(tiles)]
    geometry = [
        (part.groups, part.stop - part.start, part.width, part.start, first)
        for part, first in zip(parts, firsts, strict=False)
    ]
    return _Side(
        modules=torch.tensor(geometry, dtype=torch.int32, device=device),
        num_modules=len(parts),
        num_columns=parts[0].groups * parts[0].width,
        num_tiles=firsts[-1],
        num_steps=max(part.groups * triton.cdiv(part.stop - part.start, _STEP_FEATURES) for part in parts),
        is_aligned=all(value % 16 == 0 for _, span, width, start, _ in geometry for value in (span, width, start)),
        first_factor=first_factor,
        ranks_first=ranks_first,
    )


class Grouped:
    """A model's adapted linear layers, as the kernels see them."""

    def __init__(self, layers: Sequence[Layer], device: torch.device):
        self.device = device
        self._layers = layers
        self._sides: dict[Key, tuple[_Side, _Side]] = {}
        first = 0
        for layer in layers:
            inputs = Features(1, 0, layer.num_inputs, layer.num_inputs)
            self._sides[layer.key] = (
                _side([inputs], first, True, device),
                _side(list(layer.modules.values()), first + 1, False, device),
            )
            first += 1 + len(layer.modules)
        self.num_factors = first
        # Then all tensors in an arena begin at a multiple of 16 bytes, as much as a GPU loads at once.
        self.is_aligned = all(side.is_aligned for sides in self._sides.values() for side in sides)
        self._factors: WeakKeyDictionary[Arena, np.ndarray] = WeakKeyDictionary()

    def batch(self, segments: Sequence[Segment]) -> Batch:
        """As `products.looped`; every adapter has one stretch of tokens."""
        stretches = _stretches(segments)
        if not stretches:
            return no_adapters
        num_tiles = sum(triton.cdiv(segment.num_tokens, TILE_ROWS) for segment in segments)
        tables = Tables(self, len(stretches), num_tiles, Ranks.of(arena for arena, *_ in stretches))
        tables.fill(segments)
        return tables.products

    def sides(self, layer: Layer) -> tuple[_Side, _Side]:
        """The layer's input and output."""
        return self._sides[layer.key]

    def factors_of(self, arena: Arena) -> np.ndarray:
        """An arena's column of `Tables.factors`: int64 [num_factors, _FIELDS]; zeros where it has no factor."""
        if arena not in self._factors:
            self._factors[arena] = self._describe(arena)
        factors = self._factors[arena].copy()
        # Not kept: an arena that was in host memory comes back to other addresses.
        factors[:, 0] += arena.weights.data_ptr()
        factors[:, 1] += arena.gradients.data_ptr()
        return factors

    def _describe(self, arena: Arena) -> np.ndarray:
        factors = np.zeros((self.num_factors, _FIELDS), np.int64)

        def put(row: int, factor: Factor, rank: int, place: int, scale: float) -> None:
            offset = factor.weight.storage_offset() * factor.weight.element_size()
            factors[row, :5] = offset, offset, rank, place, int(np.float32(scale).view(np.int32))

        for layer in self._layers:
            adapter = arena.linears.get(layer.key)
            if adapter is None:
                continue
            row = self._sides[layer.key][0].first_factor
            put(row, adapter.a, sum(adapter.ranks), 0, 1.0)
            places = [0, *itertools.accumulate(adapter.ranks)]
            modules = list(layer.modules)
            for (module, b), rank, place, scale in zip(
                adapter.b.items(), adapter.ranks, places, adapter.scales, strict=False
            ):
                put(row + 1 + modules.index(module), b, rank, place, scale)
        return factors


class Tables:
    """Which rows of a pass belong to which adapter, and where its factors lie, on the device."""

    def __init__(self, model: Grouped, num_slots: int, num_tiles: int, ranks: Ranks):
        """Empty, for at most that many adapters and tiles."""
        self.model = model
        self.ranks = ranks
        self.factors = torch.zeros(model.num_factors, num_slots, _FIELDS, dtype=torch.int64, device=model.device)
        self.slots = torch.zeros(num_slots, 2, dtype=torch.int32, device=model.device)
        self.tiles = torch.zeros(num_tiles, 3, dtype=torch.int32, device=model.device)

    def fill(self, segments: Sequence[Segment]) -> None:
        """For a pass whose tokens `segments` cover in order."""
        factors = np.zeros(self.factors.shape, np.int64)
        slots = np.zeros(self.slots.shape, np.int32)
        tiles = np.zeros(self.tiles.shape, np.int32)
        for slot, (arena, start, end) in enumerate(_stretches(segments)):
            factors[:, slot] = self.model.factors_of(arena)
            slots[slot] = start, end
        number = slot = start = 0
        for segment in segments:
            end = start + segment.num_tokens
            firsts = np.arange(start, end, TILE_ROWS)
            mine = tiles[number : number + len(firsts)]
            mine[:, 0] = -1 if segment.arena is None else slot
            mine[:, 1], mine[:, 2] = firsts, np.minimum(firsts + TILE_ROWS, end)
            number, start, slot = number + len(firsts), end, slot + (segment.arena is not None)
        for table, values in ((self.factors, factors), (self.slots, slots), (self.tiles, tiles)):
            table.copy_(torch.from_numpy(values))

    def products(self, layer: Layer) -> Products:
        """With one layer."""
        return _Grouped(self, *self.model.sides(layer))


def _stretches(segments: Sequence[Segment]) -> list[tuple[Arena, int, int]]:
    """The adapters, and where the tokens of each start and end."""
    ends = itertools.accumulate(segment.num_tokens for segment in segments)
    return [
        (segment.arena, end - segment.num_tokens, end)
        for segment, end in zip(segments, ends, strict=True)
        if segment.arena is not None
    ]


class _Grouped:
    def __init__(self, tables: Tables, inputs: _Side, outputs: _Side):
        self._tables = tables
        self._inputs = inputs
        self._outputs = outputs

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return self._shrink(x, self._inputs)

    def up(self, low: torch.Tensor) -> torch.Tensor:
        return self._expand(low, self._outputs)

    def down_gradient(self, grad_y: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        self._accumulate(grad_y, low, self._outputs)
        return self._shrink(grad_y, self._outputs)

    def up_gradient(self, grad_low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self._accumulate(x, grad_low, self._inputs)
        return self._expand(grad_low, self._inputs)

    @property
    def _width(self) -> int:
        return self._outputs.num_modules * self._tables.ranks.most

    def _ranks(self, side: _Side) -> tuple[int, int]:
        """Ranks in a block, and blocks in a module."""
        ranks = self._width if side is self._inputs else self._tables.ranks.most
        block = min(triton.next_power_of_2(ranks), _MAX_BLOCK_RANKS)
        return block, triton.cdiv(ranks, block)

    def _shrink(self, x: torch.Tensor, side: _Side) -> torch.Tensor:
        tables, (block, num_blocks) = self._tables, self._ranks(side)
        num_programs = triton.cdiv(len(x), TILE_ROWS) * side.num_modules * num_blocks
        # Few tiles would leave most of the GPU idle, so several programs share one, each with its own features.
        splits = max(1, min(_PROGRAMS // num_programs, side.num_steps // 4))
        low = x.new_empty(len(x), 1, self._width)
        parts = low if splits == 1 else x.new_empty(splits, len(x), self._width, dtype=torch.float32)
        _shrink[len(tables.tiles), side.num_modules * num_blocks, splits](
            x,
            parts,
            tables.factors[side.first_factor],
            side.modules,
            tables.tiles,
            x.stride(0),
            self._width,
            low.numel(),
            len(tables.slots),
            RANKS_FIRST=side.ranks_first,
            ALIGNED=self._tables.model.is_aligned,
            RANKS_ALIGNED=tables.ranks.are_aligned,
            BLOCK_T=TILE_ROWS,
            BLOCK_R=block,
            BLOCK_K=_STEP_FEATURES,
            NUM_BLOCKS=num_blocks,
            SPLITS=splits,
            FIELDS=_FIELDS,
            GEOMETRY=_GEOMETRY,
        )
        if splits > 1:
            size = low.numel()
            _sum_splits[(triton.cdiv(size, 1024),)](parts, low, size, SPLITS=splits, BLOCK=1024)
        return low

    def _expand(self, low: torch.Tensor, side: _Side) -> torch.Tensor:
        tables, (block, _) = self._tables, self._ranks(side)
        y = low.new_empty(len(low), 1, side.num_columns)
        _expand[len(tables.tiles), side.num_tiles](
            y,
            low,
            tables.factors[side.first_factor],
            side.modules,
            tables.tiles,
            y.stride(0),
            low.stride(0),
            len(tables.slots),
            RANKS_FIRST=side.ranks_first,
            ALIGNED=self._tables.model.is_aligned,
            RANKS_ALIGNED=tables.ranks.are_aligned,
            NUM_MODULES=side.num_modules,
            BLOCK_T=TILE_ROWS,
            BLOCK_R=block,
            BLOCK_N=_TILE_FEATURES,
            FIELDS=_FIELDS,
            GEOMETRY=_GEOMETRY,
        )
        return y

    def _accumulate(self, x: torch.Tensor, low: torch.Tensor, side: _Side) -> None:
        tables, (block, num_blocks) = self._tables, self._ranks(side)
        _accumulate[side.num_tiles, num_blocks, len(tables.slots)](
            x,
            low,
            tables.factors[side.first_factor],
            side.modules,
            tables.slots,
            x.stride(0),
            low.stride(0),
            len(tables.slots),
            RANKS_FIRST=side.ranks_first,
            ALIGNED=self._tables.model.is_aligned,
            RANKS_ALIGNED=tables.ranks.are_aligned,
            NUM_MODULES=side.num_modules,
            BLOCK_T=TILE_ROWS,
            BLOCK_R=block,
            BLOCK_N=_TILE_FEATURES,
            FIELDS=_FIELDS,
            GEOMETRY=_GEOMETRY,
        )
