"""Attention over a paged key/value cache in plain torch: the definition that faster paths are checked against."""

import torch
from torch import Tensor


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    *,
    window: int | None = None,
) -> Tensor:
    """Causal attention of each sequence's rows over its own cached tokens, scaled by ``1 / sqrt(D)``, in float32.

    The rows of a sequence are its last tokens; their keys and values are in the cache already. With ``window`` w a
    token sees itself and the w - 1 tokens before it.
    Shapes: q [T, H, D]; k_cache, v_cache [blocks, block_size, Hkv, D]; block_tables [B, M]; query_starts [B + 1];
    kv_lens [B] -> [T, H, D] in q's dtype.
    """
    num_heads, head_dim = q.shape[1:]
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for i, num_keys in enumerate(kv_lens.tolist()):
        start, stop = starts[i], starts[i + 1]
        keys, values = (cache[block_tables[i].long()].flatten(0, 1)[:num_keys].float() for cache in (k_cache, v_cache))
        group = num_heads // keys.shape[1]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), keys) * head_dim**-0.5
        query_pos = torch.arange(num_keys - (stop - start), num_keys, device=q.device)[:, None]
        key_pos = torch.arange(num_keys, device=q.device)[None, :]
        visible = key_pos <= query_pos
        if window is not None:
            visible &= key_pos > query_pos - window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
