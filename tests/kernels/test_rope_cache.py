"""Norms, rotation and cache write in one launch against the same in plain torch."""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_support import DEVICE, DTYPES, assert_close, randn

from loraplex_server.kernels.rope_cache import rope_and_cache  # isort: skip
from loraplex_server.kernels.rope_cache_ref import rope_and_cache_ref

BLOCK_SIZE = 16


def tables(length: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] / 10000.0 ** (torch.arange(half) / half)
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 1, 64), (6, 2, 96), (7, 7, 128), (12, 2, 128)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_queries_turn_in_place_and_keys_and_values_land_in_their_slots(
    num_heads: int, num_kv_heads: int, head_dim: int, with_norm: bool, dtype: torch.dtype
) -> None:
    qkv = randn(5, (num_heads + 2 * num_kv_heads) * head_dim, seed=0, dtype=dtype)
    qk_norm = randn(num_heads + num_kv_heads, head_dim, seed=1, dtype=dtype) if with_norm else None
    positions = torch.tensor([0, 17, 3, 39, 2], device=DEVICE)
    slots = torch.tensor([40, 3, -1, 63, 0], device=DEVICE)
    cos, sin = tables(40, head_dim // 2)
    caches = [randn(2, 4, BLOCK_SIZE, num_kv_heads, head_dim, seed=2, dtype=dtype) for _ in range(2)]
    results = [qkv.clone(), qkv.clone()]
    for call, x, cache in zip((rope_and_cache, rope_and_cache_ref), results, caches, strict=True):
        call(x, positions, cos, sin, slots, cache[0], cache[1], qk_norm=qk_norm, eps=1e-6)
    queries = [x[:, : num_heads * head_dim] for x in results]
    assert_close(*queries)
    assert_close(*caches)
    # Values are copied, and what no slot names keeps its content.
    assert torch.equal(caches[0][1], caches[1][1])


def test_a_step_of_padding_rows_alone_writes_nothing() -> None:
    cache = torch.full((2, 1, BLOCK_SIZE, 1, 64), 7.0, device=DEVICE)
    cos, sin = tables(1, 32)
    zeros, skip = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.full((3,), -1, device=DEVICE)
    rope_and_cache(randn(3, 192, seed=0), zeros, cos, sin, skip, cache[0], cache[1])
    assert bool((cache == 7).all())
