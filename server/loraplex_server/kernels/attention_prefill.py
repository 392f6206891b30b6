# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Causal attention of many query rows a sequence over the paged cache, whatever part of it is new.

Sequences of any lengths share one launch. A tile holds a few queries with all the query heads of one key head, so
that each key is loaded once for all of them, and a decode row in a mixed batch costs one small tile.

Defined by ``paged_attention_ref``. Source: FlashAttention-2 (arXiv 2307.08691), over block tables.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options

# Rows, keys, warps and stages of a tile, for 16-bit heads.
TILE: Final = (128, 64, 4, 3)


@triton.jit
def _attend(
    acc, highest, total, q, pos, start, k_ptr, v_ptr, table_ptr, num_keys, kv_head, scale_log2, window,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, CACHE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys [start, start + BLOCK_N) into the running softmax. Unmasked: every row sees all of them."""
    key = start + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, DIM_BLOCK)
    if MASKED:
        block = tl.load(table_ptr + key // CACHE_BLOCK, mask=key < num_keys, other=0).to(tl.int64)
    else:
        block = tl.load(table_ptr + key // CACHE_BLOCK).to(tl.int64)
    at = ((block * CACHE_BLOCK + key % CACHE_BLOCK) * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    if MASKED or HEAD_DIM != DIM_BLOCK:
        loads = (key < num_keys)[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + at, mask=loads, other=0.0)
        v = tl.load(v_ptr + at, mask=loads, other=0.0)
    else:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        visible = key[None, :] <= pos[:, None]
        if WINDOWED:
            visible = visible & (key[None, :] > pos[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    raised = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
    # A window may hide a whole block from a row, whose maximum is then still -inf.
    base = tl.where(raised == float("-inf"), 0.0, raised) if WINDOWED else raised
    weights = tl.exp2(scores * scale_log2 - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, raised, total


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, lens_ptr, out_ptr, q_stride, table_stride, scale_log2, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    CACHE_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    seq = tl.program_id(1)
    # The last tiles see the most keys: started first, they do not finish alone.
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first_row = tl.load(starts_ptr + seq)
    num_queries = tl.load(starts_ptr + seq + 1) - first_row
    num_keys = tl.load(lens_ptr + seq)
    first_query = tile * QUERIES
    if first_query >= num_queries:
        return
    lane = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM_BLOCK)
    query = first_query + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    here = ((lane < QUERIES * GROUP) & (query < num_queries))[:, None] & (dim < HEAD_DIM)[None, :]
    token = (first_row + query).to(tl.int64)
    q = tl.load(q_ptr + token[:, None] * q_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=here, other=0.0)

    prefix = num_keys - num_queries
    pos = prefix + query
    end = prefix + tl.minimum(first_query + QUERIES, num_queries)
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if WINDOWED:
        middle = tl.maximum(prefix + first_query - window + 1, 0) // BLOCK_N * BLOCK_N
    else:
        # Up to here every row of the tile sees every key.
        middle = (prefix + first_query + 1) // BLOCK_N * BLOCK_N
        for start in range(0, middle, BLOCK_N):
            acc, highest, total = _attend(
                acc, highest, total, q, pos, start, k_ptr, v_ptr, table_ptr, num_keys, kv_head, scale_log2, window,
                NUM_KV_HEADS, HEAD_DIM, DIM_BLOCK, CACHE_BLOCK, BLOCK_N, False, False, PRECISION,
            )  # fmt: skip
    for start in range(middle, end, BLOCK_N):
        acc, highest, total = _attend(
            acc, highest, total, q, pos, start, k_ptr, v_ptr, table_ptr, num_keys, kv_head, scale_log2, window,
            NUM_KV_HEADS, HEAD_DIM, DIM_BLOCK, CACHE_BLOCK, BLOCK_N, True, WINDOWED, PRECISION,
        )  # fmt: skip
    out_at = out_ptr + (token[:, None] * (NUM_KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + dim[None, :]
    # Rows of the tile that stand for no query may have seen no key.
    total = tl.where(total > 0.0, total, 1.0)
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=here)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    *,
    max_query_len: int,
    window: int | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``paged_attention_ref``. No sequence may have more than ``max_query_len`` rows, and none more rows than keys.

    Rows of q past ``query_starts[B]`` (padding) are left as they are in ``out``.
    Shapes: q [T, H, D], each row contiguous; k_cache, v_cache [blocks, block_size, Hkv, D] contiguous; block_tables
    [B, M], query_starts [B + 1], kv_lens [B], all int32; out [T, H, D] contiguous -> [T, H, D]. ``scale`` is
    ``1 / sqrt(D)`` by default.
    """
    num_tokens, num_heads, head_dim = q.shape
    cache_block, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    if out is None:
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    block_m, block_n, num_warps, num_stages = _tile(q.element_size(), max_query_len * group)
    block_m = max(block_m, triton.next_power_of_2(group))
    _prefill_kernel[(num_kv_heads, kv_lens.shape[0], triton.cdiv(max_query_len, block_m // group))](
        q, k_cache, v_cache, block_tables, query_starts, kv_lens, out, q.stride(0), block_tables.stride(0),
        (scale or head_dim**-0.5) * 1.4426950408889634, window or 0,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, DIM_BLOCK=triton.next_power_of_2(head_dim),
        CACHE_BLOCK=cache_block, BLOCK_M=block_m, BLOCK_N=block_n, WINDOWED=window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=num_warps, num_stages=num_stages,
        **launch_options(q.device),
    )  # fmt: skip
    return out


def _tile(element_size: int, num_rows: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps and stages; ``num_rows`` counts the rows of the longest sequence in all heads of
    a group."""
    if num_rows <= 64:
        return (16, 64 if element_size == 2 else 32, 4, 3)
    return TILE if element_size == 2 else (64, 32, 8, 2)
