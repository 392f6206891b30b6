"""Rotary embedding and the write of keys and values into the paged cache, in plain torch: the definition that the
fused kernel is checked against."""

from torch import Tensor

from loraplex_server.kernels.norm_ref import rms_norm_ref
from loraplex_server.kernels.rope_ref import rope_ref


def rope_and_cache_ref(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    qk_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate the queries of ``qkv`` in place; write its rotated keys, and its values, to their slots of the cache.

    With ``qk_norm`` every query and key head goes through its RMSNorm first (Qwen3). Everything is rounded to qkv's
    dtype after each multiplication and addition, as transformers does. Keys in ``qkv`` are left in an undefined state.
    Shapes: qkv [T, (H + 2 Hkv) D]; positions [T]; cos, sin [P, D / 2]; kv_slots [T], slot = block * block_size +
    offset, -1 = not written; k_cache, v_cache [blocks, block_size, Hkv, D] of one layer; qk_norm [H + Hkv, D].
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    normed = qk if qk_norm is None else rms_norm_ref(qk, qk_norm, eps)
    row_cos, row_sin = (table[positions].to(qkv.dtype).unsqueeze(1) for table in (cos, sin))
    rotated = rope_ref(normed, row_cos, row_sin)
    num_heads = qk.shape[1] - num_kv_heads
    qk[:, :num_heads] = rotated[:, :num_heads]
    kept = kv_slots >= 0
    k_cache.flatten(0, 1)[kv_slots[kept]] = rotated[kept, num_heads:]
    v_cache.flatten(0, 1)[kv_slots[kept]] = v[kept]
