"""Rotary embedding, cache write and attention of a decode step's rows in plain torch: the definition that the fused
kernel is checked against."""

import torch
from torch import Tensor

from loraplex_server.kernels.attention_ref import paged_attention_ref
from loraplex_server.kernels.rope_cache_ref import rope_and_cache_ref


def attend_rows_ref(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    *,
    qk_norm: Tensor | None = None,
    eps: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """``rope_and_cache_ref`` of one new token a row, then ``paged_attention_ref`` over all its keys.

    Where ``kv_lens`` is n > 0, ``positions`` is n - 1 and ``kv_slots`` the slot that the row's table gives it.
    Shapes: qkv [B, (H + 2 Hkv) D], whose queries may be overwritten; positions, kv_slots [B] int64; cos, sin
    [P, D / 2]; k_cache, v_cache [blocks, block_size, Hkv, D]; block_tables [B, M] int32; kv_lens [B] int32; qk_norm
    [H + Hkv, D] -> [B, H, D].
    """
    rope_and_cache_ref(qkv, positions, cos, sin, kv_slots, k_cache, v_cache, qk_norm=qk_norm, eps=eps)
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_rows, width = qkv.shape
    q = qkv[:, : width - 2 * num_kv_heads * head_dim].view(num_rows, -1, head_dim)
    starts = torch.arange(num_rows + 1, device=qkv.device)
    return paged_attention_ref(q, k_cache, v_cache, block_tables, starts, kv_lens, window=window)
