# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Per-head norms, rotary embedding and the cache write of a layer's q, k and v in one launch.

Defined by ``rope_and_cache_ref``, and rounded where it rounds.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options


@triton.jit
def _rope_cache_kernel(
    qkv_ptr, positions_ptr, cos_ptr, sin_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, norm_ptr, qkv_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    col = tl.arange(0, HALF_BLOCK)[None, :]
    num_rotated: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    mask = (head < num_rotated + NUM_KV_HEADS) & (col < HALF)
    rotates = mask & (head < num_rotated)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    dtype = qkv_ptr.dtype.element_ty
    at = qkv_ptr + token * qkv_stride + head * (2 * HALF) + col
    first = tl.load(at, mask=mask, other=0.0)
    second = tl.load(at + HALF, mask=mask, other=0.0)
    # Values fall through the rotation with an angle of zero.
    cos = tl.load(cos_ptr + position * HALF + col + head * 0, mask=rotates, other=1.0).to(dtype).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + col + head * 0, mask=rotates, other=0.0).to(dtype).to(tl.float32)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        weight = norm_ptr + head * (2 * HALF) + col
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        first_weight = tl.load(weight, mask=rotates, other=0.0).to(tl.float32)
        second_weight = tl.load(weight + HALF, mask=rotates, other=0.0).to(tl.float32)
        a = tl.where(rotates, ((a * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32), a)
        b = tl.where(rotates, ((b * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32), b)
    first = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
    second = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
    is_query = mask & (head < NUM_HEADS)
    tl.store(at, first.to(dtype), mask=is_query)
    tl.store(at + HALF, second.to(dtype), mask=is_query)
    is_key = mask & (head >= NUM_HEADS) & (head < num_rotated) & (slot >= 0)
    key = k_cache_ptr + (slot * NUM_KV_HEADS + head - NUM_HEADS) * (2 * HALF) + col
    tl.store(key, first.to(dtype), mask=is_key)
    tl.store(key + HALF, second.to(dtype), mask=is_key)
    is_value = mask & (head >= num_rotated) & (slot >= 0)
    value = v_cache_ptr + (slot * NUM_KV_HEADS + head - num_rotated) * (2 * HALF) + col
    tl.store(value, first.to(dtype), mask=is_value)
    tl.store(value + HALF, second.to(dtype), mask=is_value)


def rope_and_cache(
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
    """``rope_and_cache_ref``. Keys in ``qkv`` keep their values; tables, norms and caches are contiguous, and rows of
    ``qkv`` too. The caches have qkv's dtype."""
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_heads = width // head_dim - 2 * num_kv_heads
    if num_tokens == 0:
        return
    # Few programs a token once tokens fill the device; one head group each while they do not.
    head_block = 4 if num_tokens < 512 else 16
    _rope_cache_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, head_block))](
        qkv, positions, cos, sin, kv_slots, k_cache, v_cache, qkv if qk_norm is None else qk_norm, qkv.stride(0), eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2, HAS_NORM=qk_norm is not None,
        HEAD_BLOCK=head_block, HALF_BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=head_block // 4,
        **launch_options(qkv.device),
    )  # fmt: skip
