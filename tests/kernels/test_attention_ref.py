"""The paged attention reference against torch's own attention on contiguous keys."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from loraplex_server.kernels.attention_ref import paged_attention_ref

BLOCK_SIZE, NUM_BLOCKS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 32, 4, 2, 8


def contiguous_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """q [n, H, D] over k, v [L, Hkv, D]; causal where no mask is given."""
    args = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    found = scaled_dot_product_attention(*args, attn_mask=visible, is_causal=visible is None, enable_gqa=True)
    return found[0].transpose(0, 1)


def paged(
    keys: list[torch.Tensor], values: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scatter sequences over shuffled blocks of caches full of noise: k_cache, v_cache, block_tables, kv_lens."""
    k_cache = torch.randn(NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM) * 100
    v_cache = torch.randn_like(k_cache) * 100
    order = torch.randperm(NUM_BLOCKS).tolist()
    tables = torch.zeros(len(keys), max(-(-len(k) // BLOCK_SIZE) for k in keys), dtype=torch.int32)
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        for block in range(-(-len(k) // BLOCK_SIZE)):
            tables[i, block] = order.pop()
            part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            k_cache[tables[i, block], : len(k[part])] = k[part]
            v_cache[tables[i, block], : len(v[part])] = v[part]
    return k_cache, v_cache, tables, torch.tensor([len(k) for k in keys], dtype=torch.int32)


def random_kv(lengths: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shapes = [(length, NUM_KV_HEADS, HEAD_DIM) for length in lengths]
    return [torch.randn(shape) for shape in shapes], [torch.randn(shape) for shape in shapes]


def test_whole_prompts_are_causal() -> None:
    lengths = [1, 5, 16]
    keys, values = random_kv(lengths)
    q = torch.randn(sum(lengths), NUM_HEADS, HEAD_DIM)
    starts = torch.tensor([0, 1, 6, 22])
    k_cache, v_cache, tables, kv_lens = paged(keys, values)
    found = paged_attention_ref(q, k_cache, v_cache, tables, starts, kv_lens)
    wanted = [contiguous_attention(*qkv) for qkv in zip(q.split(lengths), keys, values, strict=True)]
    torch.testing.assert_close(found, torch.cat(wanted))


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_rows_are_the_last_tokens_and_see_their_window(window: int | None) -> None:
    keys, values = random_kv([11, 6])
    q = torch.randn(3 + 1, NUM_HEADS, HEAD_DIM)
    k_cache, v_cache, tables, kv_lens = paged(keys, values)
    starts = torch.tensor([0, 3, 4])
    found = paged_attention_ref(q, k_cache, v_cache, tables, starts, kv_lens, window=window)
    reach = window or 100
    for row, (index, position) in enumerate([(0, 8), (0, 9), (0, 10), (1, 5)]):
        seen = slice(max(0, position + 1 - reach), position + 1)
        alone = torch.ones(1, seen.stop - seen.start, dtype=torch.bool)
        wanted = contiguous_attention(q[row : row + 1], keys[index][seen], values[index][seen], alone)
        torch.testing.assert_close(found[row : row + 1], wanted)
