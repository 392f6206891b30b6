# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Adapter deltas of prompts: rows of one adapter stand together, and every adapter's rows are cut into tiles.

A launch shrinks all tiles whatever their adapters and ranks (q, k and v at once: their A are stacked), another expands
and adds. The one that expands gate and up also activates them, because what it reads and writes is what activating
reads and writes. Factors are read from the table that decode rows use; each program reads only its own adapter's ranks.

A row's delta depends on its own values alone. Only into how many partial sums K is split follows from the number of
tiles in the batch; a batch of the same shape repeats bit by bit.
Source: the segmented gather of Punica (arXiv 2310.18547), here over contiguous images and true ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options
from loraplex_server.kernels.lora_rows_ref import MAX_PARTS

# Rows of a tile.
TILE_ROWS: Final = 64
# Columns, warps and stages of a tile.
EXPAND_TILE: Final = (128, 4, 2)
GATE_TILE: Final = (128, 8, 2)
# Programs of a shrink below which K is split.
_ENOUGH_PROGRAMS: Final = 120
_MAX_SPLITS: Final = 16
_BLOCK_K: Final = 128
_PARTIAL_FLOATS: Final = 8 * 1024 * 1024


@triton.jit
def _shrink_kernel(
    x_ptr, x_stride, arena_ptr, table_ptr, table_stride, tiles_ptr, out_ptr, out_stride, split_stride, k_size, per_split,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tile, rank_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    first, last = tl.load(tiles_ptr + tile * 3), tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2)
    entry = table_ptr + tl.maximum(slot, 0).to(tl.int64) * table_stride
    rank = tl.load(entry + 1).to(tl.int32)
    a_ptr = arena_ptr + tl.multiple_of(tl.load(entry), 8)
    if PDL:
        gdc_wait()
    if (slot < 0) | (rank_tile * RANKS >= rank):
        return
    row = first + tl.arange(0, ROWS)
    r = rank_tile * RANKS + tl.arange(0, RANKS)
    x_at = x_ptr + row[:, None].to(tl.int64) * x_stride
    a_at = a_ptr + r[:, None].to(tl.int64) * k_size
    k_begin = split * per_split
    k_end = tl.minimum(k_begin + per_split, k_size)
    acc = tl.zeros([ROWS, RANKS], tl.float32)
    for k_start in range(k_begin, k_end, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x = tl.load(x_at + k[None, :], mask=(row < last)[:, None], other=0.0)
            a = tl.load(a_at + k[None, :], mask=(r < rank)[:, None], other=0.0)
        else:
            x = tl.load(x_at + k[None, :], mask=(row < last)[:, None] & (k < k_size)[None, :], other=0.0)
            a = tl.load(a_at + k[None, :], mask=(r < rank)[:, None] & (k < k_size)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(a), acc, input_precision=PRECISION)
    out_at = out_ptr + split * split_stride + row[:, None].to(tl.int64) * out_stride + r[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(row < last)[:, None] & (r < rank)[None, :])


@triton.jit
def _join_kernel(partial_ptr, out_ptr, size, num_splits, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(partial_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _delta(
    v_ptr, v_stride, b_ptr, row, last, rank_base, rank, n, n_size,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shrunk rows times one linear's B, at the columns ``n`` of it: [ROWS, BLOCK_N] float32."""
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for rank_start in range(0, rank, RANKS):
        r = rank_start + tl.arange(0, RANKS)
        v = tl.load(
            v_ptr + row[:, None].to(tl.int64) * v_stride + (rank_base + r)[None, :],
            mask=(row < last)[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + n[:, None].to(tl.int64) * rank + r[None, :],
            mask=(n < n_size)[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(v, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _expand_kernel(
    out_ptr, out_stride, v_ptr, v_stride, arena_ptr, table_ptr, table_stride, tiles_ptr, k_size,
    n0, n1, n2, col_tiles0, col_tiles1,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    col_tile, tile = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    first, last = tl.load(tiles_ptr + tile * 3), tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2)
    entry = table_ptr + tl.maximum(slot, 0).to(tl.int64) * table_stride
    total = tl.load(entry + 1)
    r0, r1, r2 = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    # Which linear of the group this tile belongs to, and where its factor, columns and ranks begin.
    is1, is2 = (col_tile >= col_tiles0) & (col_tile < col_tiles0 + col_tiles1), col_tile >= col_tiles0 + col_tiles1
    rank = tl.multiple_of(tl.where(is2, r2, tl.where(is1, r1, r0)).to(tl.int32), 8)
    n_size = tl.where(is2, n2, tl.where(is1, n1, n0))
    column = tl.where(is2, n0 + n1, tl.where(is1, n0, 0))
    rank_base = tl.multiple_of(tl.where(is2, r0 + r1, tl.where(is1, r0, 0)).to(tl.int32), 8)
    before = tl.where(is2, n0 * r0 + n1 * r1, tl.where(is1, n0 * r0, 0))
    b_ptr = arena_ptr + tl.multiple_of(tl.load(entry) + total * k_size + before, 8)
    if PDL:
        gdc_wait()
    if (slot < 0) | (rank == 0):
        return
    col_tile -= tl.where(is2, col_tiles0 + col_tiles1, tl.where(is1, col_tiles0, 0))
    n = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first + tl.arange(0, ROWS)
    out = out_ptr + row[:, None].to(tl.int64) * out_stride + (column + n)[None, :]
    mask = (row < last)[:, None] & (n < n_size)[None, :]
    base = tl.load(out, mask=mask, other=0.0)  # on its way while the delta is worked out
    delta = _delta(v_ptr, v_stride, b_ptr, row, last, rank_base, rank, n, n_size, ROWS, RANKS, BLOCK_N, PRECISION)
    tl.store(out, (base.to(tl.float32) + delta).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, in_stride, out_ptr, v_ptr, v_stride, arena_ptr, table_ptr, table_stride, tiles_ptr, k_size, size,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    first, last = tl.load(tiles_ptr + tile * 3), tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2)
    entry = table_ptr + tl.maximum(slot, 0).to(tl.int64) * table_stride
    used = (slot >= 0).to(tl.int32)
    gate_rank = tl.multiple_of(tl.load(entry + 2).to(tl.int32) * used, 8)
    up_rank = tl.multiple_of(tl.load(entry + 3).to(tl.int32) * used, 8)
    b_ptr = arena_ptr + tl.multiple_of(tl.load(entry) + tl.load(entry + 1) * k_size, 8)
    up_b_ptr = b_ptr + tl.multiple_of(tl.load(entry + 2) * size, 8)
    if PDL:
        gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first + tl.arange(0, ROWS)
    mask = (row < last)[:, None] & (n < size)[None, :]
    at = gate_up_ptr + row[:, None].to(tl.int64) * in_stride + n[None, :]
    gate = tl.load(at, mask=mask, other=0.0)
    up = tl.load(at + size, mask=mask, other=0.0)
    dtype = out_ptr.dtype.element_ty
    if slot >= 0:
        delta = _delta(v_ptr, v_stride, b_ptr, row, last, 0, gate_rank, n, size, ROWS, RANKS, BLOCK_N, PRECISION)
        gate = (gate.to(tl.float32) + delta).to(dtype)
        delta = _delta(
            v_ptr, v_stride, up_b_ptr, row, last, gate_rank, up_rank, n, size, ROWS, RANKS, BLOCK_N, PRECISION
        )  # fmt: skip
        up = (up.to(tl.float32) + delta).to(dtype)
    wide = gate.to(tl.float32)
    # Rounded between the two steps, as torch rounds silu's result before it is multiplied.
    activated = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
    product = (activated * up.to(tl.float32)).to(dtype)
    tl.store(out_ptr + row[:, None].to(tl.int64) * size + n[None, :], product, mask=mask)


@dataclass(frozen=True, slots=True)
class RowTiles:
    """The rows of a batch in tiles of one adapter each; rows of the base are tiles with slot -1.

    Shapes: tiles [P, 3] int32: first row, row after the last (at most 64 of them), slot. ``most_ranks`` bounds the
    stacked ranks of every group of linears of these adapters.
    """

    tiles: Tensor
    most_ranks: int


@dataclass(frozen=True, slots=True)
class SegmentWorkspace:
    """Where shrunk rows wait for their expansion; reused by every launch, never by two streams at once.

    Shapes: shrunk [rows * ranks], in the activations' dtype; partial [floats] float32.
    """

    shrunk: Tensor
    partial: Tensor

    @classmethod
    def allocate(
        cls, *, max_rows: int, rank_capacity: int, dtype: torch.dtype, device: torch.device
    ) -> "SegmentWorkspace":
        """For batches of up to ``max_rows`` rows, and adapters of up to ``rank_capacity`` ranks in a group."""
        shrunk = torch.empty(max_rows * rank_capacity, dtype=dtype, device=device)
        return cls(shrunk, torch.empty(_PARTIAL_FLOATS, dtype=torch.float32, device=device))


@dataclass(frozen=True, slots=True)
class GroupFactors:
    """One group of linears at one layer for every slot: see ``lora_rows_ref``. part_sizes: each linear's columns."""

    arena: Tensor
    table: Tensor
    part_sizes: tuple[int, ...]


def cut_rows(segments: Iterable[tuple[int, int, int]], num_rows: int) -> list[tuple[int, int, int]]:
    """``RowTiles.tiles`` as a list, from segments (start, stop, slot) in order; rows in none of them get slot -1."""
    tiles, cursor = [], 0
    for start, stop, slot in (*segments, (num_rows, num_rows, -1)):
        for low, high, owner in ((cursor, start, -1), (start, stop, slot)):
            tiles += [(first, min(first + TILE_ROWS, high), owner) for first in range(low, high, TILE_ROWS)]
        cursor = stop
    return tiles


def lora_add(out: Tensor, x: Tensor, factors: GroupFactors, rows: RowTiles, workspace: SegmentWorkspace) -> None:
    """Add every row's delta to ``out`` [T, N] in place; x [T, K]; rows contiguous. Defined by ``lora_rows_ref``."""
    n0, n1, n2 = (*factors.part_sizes, *(0,) * (MAX_PARTS - len(factors.part_sizes)))
    v = _shrink(x, factors, rows, workspace)
    block_n, num_warps, num_stages = EXPAND_TILE
    col_tiles = [triton.cdiv(n, block_n) for n in (n0, n1, n2)]
    _expand_kernel[(sum(col_tiles), rows.tiles.shape[0])](
        out, out.stride(0), v, v.stride(0), factors.arena, factors.table, factors.table.stride(0), rows.tiles,
        x.shape[1], n0, n1, n2, col_tiles[0], col_tiles[1],
        ROWS=TILE_ROWS, RANKS=_ranks(rows.most_ranks, 32), BLOCK_N=block_n, PRECISION=_precision(x),
        num_warps=num_warps, num_stages=num_stages, **launch_options(x.device),
    )  # fmt: skip


def lora_silu_mul(
    gate_up: Tensor, x: Tensor, factors: GroupFactors, rows: RowTiles, workspace: SegmentWorkspace, *, out: Tensor
) -> Tensor:
    """``silu_mul_ref`` of ``gate_up`` [T, 2I] with every row's delta added; gate_up keeps its values.

    Shapes: x [T, K], out [T, I] contiguous -> out.
    """
    v = _shrink(x, factors, rows, workspace)
    block_n, num_warps, num_stages = GATE_TILE
    _silu_mul_kernel[(triton.cdiv(out.shape[1], block_n), rows.tiles.shape[0])](
        gate_up, gate_up.stride(0), out, v, v.stride(0), factors.arena, factors.table, factors.table.stride(0),
        rows.tiles, x.shape[1], out.shape[1],
        ROWS=TILE_ROWS, RANKS=_ranks(rows.most_ranks, 32), BLOCK_N=block_n, PRECISION=_precision(x),
        num_warps=num_warps, num_stages=num_stages, **launch_options(x.device),
    )  # fmt: skip
    return out


def _shrink(x: Tensor, factors: GroupFactors, rows: RowTiles, workspace: SegmentWorkspace) -> Tensor:
    """Every row times its adapter's stacked A. Shape: [T, most_ranks]; only a row's own ranks hold values."""
    (num_rows, k_size), most = x.shape, rows.most_ranks
    v = workspace.shrunk[: num_rows * most].view(num_rows, most)
    ranks = _ranks(most, 64)
    grid = (rows.tiles.shape[0], triton.cdiv(most, ranks))
    splits = min(_MAX_SPLITS, triton.cdiv(k_size, _BLOCK_K), workspace.partial.numel() // v.numel())
    splits = max(1, min(splits, 2 * _ENOUGH_PROGRAMS // (grid[0] * grid[1])))
    per_split = triton.cdiv(triton.cdiv(k_size, splits), _BLOCK_K) * _BLOCK_K
    splits = triton.cdiv(k_size, per_split)
    options = launch_options(x.device)
    target = v if splits == 1 else workspace.partial
    _shrink_kernel[(*grid, splits)](
        x, x.stride(0), factors.arena, factors.table, factors.table.stride(0), rows.tiles, target, most, v.numel(),
        k_size, per_split,
        ROWS=TILE_ROWS, RANKS=ranks, BLOCK_K=_BLOCK_K, EVEN_K=k_size % _BLOCK_K == 0, PRECISION=_precision(x),
        num_warps=4, num_stages=4, **options,
    )  # fmt: skip
    if splits > 1:
        block = 1024
        _join_kernel[(triton.cdiv(v.numel(), block),)](
            workspace.partial, v, v.numel(), splits, BLOCK=block, num_warps=4, **options
        )
    return v


def _ranks(most: int, limit: int) -> int:
    return min(limit, max(16, int(triton.next_power_of_2(most))))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
