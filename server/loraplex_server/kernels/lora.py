# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Adapter deltas of decode rows: two launches a group of linears, whatever adapters the rows use. Defined by
``lora_rows_ref``.

Rows that share an adapter are computed together, so each adapter's factors are read once. Which rows those are, where
the factors lie and which ranks they have comes from device tensors alone: a CUDA graph captured once serves any mix.
The first launch shrinks (split over K, partial sums in fixed places), the second sums the parts in order, expands and
adds; no float atomics, so results repeat bit by bit.
Source: the segmented gather of Punica (arXiv 2310.18547), here over contiguous images and true ranks.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options
from loraplex_server.kernels.lora_rows_ref import MAX_PARTS, RowGroups

# Programs of a shrink beyond which splitting K further brings nothing.
_ENOUGH_PROGRAMS: Final = 256
_MAX_SPLITS: Final = 16


@triton.jit
def _shrink_kernel(
    x_ptr, x_stride, arena_ptr, table_ptr, table_stride, order_ptr, starts_ptr, slots_ptr, partial_ptr, rank_capacity, k_size,
    per_split, num_rows, ROWS: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    slot = tl.load(slots_ptr + group)
    if slot < 0:
        if PDL:
            gdc_wait()
        return
    entry = table_ptr + slot.to(tl.int64) * table_stride
    rank = tl.load(entry + 1).to(tl.int32)
    a_ptr = arena_ptr + tl.load(entry)
    first, last = tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)
    if PDL:
        gdc_wait()
    k_begin = split * per_split
    k_end = tl.minimum(k_begin + per_split, k_size)
    for row_start in range(first, last, ROWS):
        at = row_start + tl.arange(0, ROWS)
        row = tl.load(order_ptr + at, mask=at < last, other=0)
        for rank_start in range(0, rank, RANKS):
            r = rank_start + tl.arange(0, RANKS)
            acc = tl.zeros([ROWS, RANKS], tl.float32)
            for k_start in range(k_begin, k_end, BLOCK_K):
                k = k_start + tl.arange(0, BLOCK_K)
                x = tl.load(
                    x_ptr + row[:, None].to(tl.int64) * x_stride + k[None, :],
                    mask=(at < last)[:, None] & (k < k_end)[None, :], other=0.0,
                )  # fmt: skip
                a = tl.load(
                    a_ptr + r[None, :].to(tl.int64) * k_size + k[:, None],
                    mask=(r < rank)[None, :] & (k < k_end)[:, None], other=0.0,
                )  # fmt: skip
                acc += tl.dot(x, a, input_precision=PRECISION)
            out = partial_ptr + (split * num_rows + row[:, None]) * rank_capacity + r[None, :]
            tl.store(out, acc, mask=(at < last)[:, None] & (r < rank)[None, :])


@triton.jit
def _expand_kernel(
    out_ptr, out_stride, arena_ptr, table_ptr, table_stride, order_ptr, starts_ptr, slots_ptr, partial_ptr, rank_capacity, k_size,
    num_splits, n0, n1, n2, tiles0, tiles1, num_rows,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    slot = tl.load(slots_ptr + group)
    if slot < 0:
        if PDL:
            gdc_wait()
        return
    entry = table_ptr + slot.to(tl.int64) * table_stride
    total = tl.load(entry + 1)
    r0, r1, r2 = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    # Which linear of the group this tile belongs to, and where its factor, columns and ranks begin.
    is1, is2 = (tile >= tiles0) & (tile < tiles0 + tiles1), tile >= tiles0 + tiles1
    rank = tl.where(is2, r2, tl.where(is1, r1, r0)).to(tl.int32)
    if rank == 0:
        if PDL:
            gdc_wait()
        return
    n_size = tl.where(is2, n2, tl.where(is1, n1, n0))
    column = tl.where(is2, n0 + n1, tl.where(is1, n0, 0))
    rank_base = tl.where(is2, r0 + r1, tl.where(is1, r0, 0)).to(tl.int32)
    before = tl.where(is2, n0 * r0 + n1 * r1, tl.where(is1, n0 * r0, 0))
    b_ptr = arena_ptr + tl.load(entry) + total * k_size + before
    tile = tile - tl.where(is2, tiles0 + tiles1, tl.where(is1, tiles0, 0))
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)
    if PDL:
        gdc_wait()
    for row_start in range(first, last, ROWS):
        at = row_start + tl.arange(0, ROWS)
        row = tl.load(order_ptr + at, mask=at < last, other=0)
        acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for rank_start in range(0, rank, RANKS):
            r = rank_start + tl.arange(0, RANKS)
            inside = (at < last)[:, None] & (r < rank)[None, :]
            v = tl.zeros([ROWS, RANKS], tl.float32)
            v_at = partial_ptr + row[:, None] * rank_capacity + (rank_base + r)[None, :]
            for split in range(num_splits):
                v += tl.load(v_at + split * num_rows * rank_capacity, mask=inside, other=0.0)
            b = tl.load(
                b_ptr + n[None, :].to(tl.int64) * rank + r[:, None],
                mask=(n < n_size)[None, :] & (r < rank)[:, None], other=0.0,
            )  # fmt: skip
            acc += tl.dot(v.to(b.dtype), b, input_precision=PRECISION)
        out = out_ptr + row[:, None].to(tl.int64) * out_stride + (column + n)[None, :]
        mask = (at < last)[:, None] & (n < n_size)[None, :]
        base = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, (base + acc).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class LoraWorkspace:
    """Where the shrunk rows wait for their expansion; reused by every launch, never by two streams at once.

    Shapes: partial [16 splits * rows, rank_capacity] float32. ``rank_capacity``: most ranks of a group, all its linears
    together.
    """

    partial: Tensor
    rank_capacity: int

    @classmethod
    def allocate(cls, *, max_rows: int, rank_capacity: int, device: torch.device) -> "LoraWorkspace":
        shape = (_MAX_SPLITS * max_rows, rank_capacity)
        return cls(torch.empty(shape, dtype=torch.float32, device=device), rank_capacity)


def lora_rows(
    out: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    rows: RowGroups,
    part_sizes: tuple[int, ...],
    workspace: LoraWorkspace,
) -> None:
    """``lora_rows_ref``, through ``workspace``, whose capacity no slot of the rows exceeds. Rows of out, x and table are
    contiguous."""
    num_rows, k_size = x.shape
    n0, n1, n2 = (*part_sizes, *(0,) * (MAX_PARTS - len(part_sizes)))
    block_k = 128
    num_groups = rows.slots.shape[0]
    splits = min(_MAX_SPLITS, max(1, _ENOUGH_PROGRAMS // num_groups), triton.cdiv(k_size, block_k))
    per_split = triton.cdiv(triton.cdiv(k_size, splits), block_k) * block_k
    splits = triton.cdiv(k_size, per_split)
    options = launch_options(x.device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    shared = (
        arena,
        table,
        table.stride(0),
        rows.order,
        rows.starts,
        rows.slots,
        workspace.partial,
        workspace.rank_capacity,
        k_size,
    )
    _shrink_kernel[(num_groups, splits)](
        x, x.stride(0), *shared, per_split, num_rows, ROWS=16, RANKS=16, BLOCK_K=block_k, PRECISION=precision, num_warps=4, num_stages=3,
        **options,
    )  # fmt: skip
    block_n = 128
    tiles = [triton.cdiv(n, block_n) for n in (n0, n1, n2)]
    _expand_kernel[(sum(tiles), num_groups)](
        out, out.stride(0), *shared, splits, n0, n1, n2, tiles[0], tiles[1], num_rows, ROWS=16, RANKS=16, BLOCK_N=block_n, PRECISION=precision, num_warps=4, num_stages=2,
        **options,
    )  # fmt: skip
