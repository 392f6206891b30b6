# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Attention of one query row a sequence over the paged cache: split over the keys, one launch.

A sequence's keys are cut into splits by its own length alone, each split is computed by one program, and the last
program to finish joins the splits in order. So a row's result has the same bits whatever else is in the batch and
however many programs share the work, and the launch depends on nothing that only the device knows.

Defined by ``paged_attention_ref``. Source: Flash-Decoding (Dao et al., 2023); here the join needs no second launch.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options

# Keys of one split at least. Shorter splits cost more to join than they save by running side by side.
MIN_SPLIT: Final = 256

# Keys of one tile (16-bit heads), warps and stages of a program; the fastest of those in benchmarks/NOTES.md.
BLOCK_N, NUM_WARPS, NUM_STAGES = 128, 8, 2

# Programs of one launch beyond which more splits side by side bring nothing: two for each multiprocessor of an H200.
_ENOUGH_PROGRAMS: Final = 264


@triton.jit
def _locate(
    tables_ptr, row, table_stride, key, end, kv_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CACHE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Offset of each key's (and value's) head in the cache; block 0 past ``end``."""
    block = tl.load(tables_ptr + row * table_stride + key // CACHE_BLOCK, mask=key < end, other=0).to(tl.int64)
    return ((block * CACHE_BLOCK + key % CACHE_BLOCK) * NUM_KV_HEADS + kv_head) * HEAD_DIM


@triton.jit
def _prefetch(cache_ptr, at, HEAD_DIM: tl.constexpr, LINES: tl.constexpr):
    """Bring the heads at ``at`` into the second-level cache, 128 bytes at a time, without waiting for them."""
    step: tl.constexpr = 1024 // cache_ptr.dtype.element_ty.primitive_bitwidth
    line = tl.minimum(tl.arange(0, LINES) * step, HEAD_DIM - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [cache_ptr + at[:, None] + line[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, lens_ptr, out_ptr, partial_ptr, lse_ptr, counters_ptr,
    q_stride, table_stride, scale_log2, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, CACHE_BLOCK: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    JOIN_COLS: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    lane = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    num_keys = tl.load(lens_ptr + row)
    first_key = tl.where(window > 0, tl.maximum(num_keys - window, 0), 0)
    per_split = tl.cdiv(tl.cdiv(num_keys - first_key, MAX_SPLITS), BLOCK_N) * BLOCK_N
    per_split = tl.maximum(per_split, MIN_SPLIT)
    num_splits = tl.cdiv(num_keys - first_key, per_split)
    if lane >= tl.maximum(num_splits, 1):
        return
    head_row = row * NUM_KV_HEADS + kv_head
    if PDL:
        # Lengths and tables are older than the launch ahead of this one; while that one ends, the first keys and
        # values come closer.
        ahead = tl.minimum(first_key + lane * per_split + tl.arange(0, MIN_SPLIT), tl.maximum(num_keys - 1, 0))
        ahead = _locate(tables_ptr, row, table_stride, ahead, num_keys, kv_head, NUM_KV_HEADS, HEAD_DIM, CACHE_BLOCK)
        _prefetch(k_ptr, ahead, HEAD_DIM, LINES)
        _prefetch(v_ptr, ahead, HEAD_DIM, LINES)
        gdc_wait()

    group = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    here = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    out_at = out_ptr + (head_row * GROUP + group)[:, None] * HEAD_DIM + dim[None, :]
    if num_keys == 0:
        tl.store(out_at, tl.zeros([GROUP_BLOCK, DIM_BLOCK], out_ptr.dtype.element_ty), mask=here)
        return
    q_at = q_ptr + row * q_stride + (kv_head * GROUP + group)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_at, mask=here, other=0.0)

    done = 0
    for split in range(lane, num_splits, tl.num_programs(1)):
        begin = first_key + split * per_split
        end = tl.minimum(begin + per_split, num_keys)
        highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_BLOCK], tl.float32)
        acc = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            valid = key < end
            base = _locate(tables_ptr, row, table_stride, key, end, kv_head, NUM_KV_HEADS, HEAD_DIM, CACHE_BLOCK)
            loads = valid[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + base[:, None] + dim[None, :], mask=loads, other=0.0)
            v = tl.load(v_ptr + base[:, None] + dim[None, :], mask=loads, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            scores = tl.where(valid[None, :], scores, float("-inf"))
            raised = tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - raised[:, None])
            shrink = tl.exp2(highest - raised)
            total = total * shrink + tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            highest = raised
        acc = acc / total[:, None]
        if num_splits == 1:
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=here)
        else:
            part = (head_row * MAX_SPLITS + split) * GROUP + group
            tl.store(partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=here)
            tl.store(lse_ptr + part, highest + tl.log2(total), mask=group < GROUP)
        done += 1

    if num_splits > 1:
        # Every thread's stores come before the one thread that announces them.
        tl.debug_barrier()
        before = tl.atomic_add(counters_ptr + head_row, done, sem="acq_rel")
        if before + done == num_splits:
            tl.store(counters_ptr + head_row, 0)
            _join(partial_ptr, lse_ptr, out_ptr, head_row, num_splits, GROUP, HEAD_DIM, MAX_SPLITS, JOIN_COLS)


@triton.jit
def _join(
    partial_ptr, lse_ptr, out_ptr, head_row, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAX_SPLITS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one key head by their sums of exponentials, four at a time, in order."""
    col = tl.arange(0, COLS)
    inside = col < GROUP * HEAD_DIM
    highest = tl.full([COLS], float("-inf"), tl.float32)
    total = tl.zeros([COLS], tl.float32)
    acc = tl.zeros([COLS], tl.float32)
    for start in range(0, num_splits, 4):
        split = start + tl.arange(0, 4)
        mask = (split < num_splits)[:, None] & inside[None, :]
        part = (head_row * MAX_SPLITS + split[:, None]) * GROUP
        # Past the first-level cache: other multiprocessors wrote these.
        lse = tl.load(lse_ptr + part + (col // HEAD_DIM)[None, :], mask=mask, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(partial_ptr + part * HEAD_DIM + col[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        raised = tl.maximum(highest, tl.max(tl.where(inside[None, :], lse, 0.0), axis=0))
        weights = tl.exp2(lse - raised[None, :])
        shrink = tl.exp2(highest - raised)
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink + tl.sum(weights * values, axis=0)
        highest = raised
    out = acc / tl.where(inside, total, 1.0)
    tl.store(out_ptr + head_row * GROUP * HEAD_DIM + col, out.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where splits are kept until they are joined; reused by every layer and step, never by two streams at once.

    Shapes: partial [B, Hkv, max_splits, H / Hkv, D] float32; lse [B, Hkv, max_splits, H / Hkv] float32;
    counters [B, Hkv] int32, all zero between launches.
    """

    partial: Tensor
    lse: Tensor
    counters: Tensor

    @classmethod
    def allocate(
        cls, *, max_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> "DecodeWorkspace":
        # From the model alone, not the batch: how a sequence is split must not depend on its neighbors.
        wanted = min(64, max(8, _ENOUGH_PROGRAMS // num_kv_heads))
        shape = (max_sequences, num_kv_heads, 1 << (wanted.bit_length() - 1), num_heads // num_kv_heads)
        return cls(
            torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.zeros(shape[:2], dtype=torch.int32, device=device),
        )

    @property
    def max_splits(self) -> int:
        return self.lse.shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.partial, self.lse, self.counters))


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    workspace: DecodeWorkspace,
    *,
    window: int | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``paged_attention_ref`` where every sequence has one row; a row whose ``kv_lens`` is 0 (padding) becomes zeros.

    ``block_tables`` and ``kv_lens`` are read before the launch ahead has ended. A kernel that lets its successors start
    early (see ``launch_options``) may write them only if an ordinary launch comes between it and this one; the KV cache
    may be written by any.
    Shapes: q [B, H, D], each row contiguous; k_cache, v_cache [blocks, block_size, Hkv, D] contiguous; block_tables
    [B, M] int32; kv_lens [B] int32; out [B, H, D] contiguous -> [B, H, D]. ``scale`` is ``1 / sqrt(D)`` by default.
    """
    num_rows, num_heads, head_dim = q.shape
    cache_block, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    if out is None:
        out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    longest = block_tables.shape[1] * cache_block
    most_splits = min(workspace.max_splits, triton.cdiv(longest, MIN_SPLIT))
    lanes = max(1, min(most_splits, triton.cdiv(_ENOUGH_PROGRAMS, num_rows * num_kv_heads)))
    dim_block = triton.next_power_of_2(head_dim)
    _decode_kernel[(num_kv_heads, lanes, num_rows)](
        q, k_cache, v_cache, block_tables, kv_lens, out, workspace.partial, workspace.lse, workspace.counters,
        q.stride(0), block_tables.stride(0), (scale or head_dim**-0.5) * 1.4426950408889634, window or 0,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, DIM_BLOCK=dim_block, CACHE_BLOCK=cache_block,
        MIN_SPLIT=MIN_SPLIT, MAX_SPLITS=workspace.max_splits, BLOCK_N=BLOCK_N if q.element_size() == 2 else 32,
        JOIN_COLS=triton.next_power_of_2(group * head_dim),
        LINES=triton.next_power_of_2(triton.cdiv(head_dim * q.element_size(), 128)),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=NUM_WARPS, num_stages=NUM_STAGES, **launch_options(q.device),
    )  # fmt: skip
    return out
