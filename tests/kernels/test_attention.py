"""Paged decode and prefill attention against plain torch over the same cache."""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_support import DEVICE, DTYPES, ON_GPU, assert_close, randn

from loraplex_server.kernels.attention_decode import DecodeWorkspace, paged_decode  # isort: skip
from loraplex_server.kernels.attention_prefill import paged_prefill  # isort: skip
from loraplex_server.kernels.rope_cache import rope_and_cache  # isort: skip
from loraplex_server.kernels.attention_ref import paged_attention_ref
from loraplex_server.kernels.rope_cache_ref import rope_and_cache_ref

HEADS = [(4, 1, 64), (6, 2, 96), (7, 7, 64), (14, 2, 128)]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Paged:
    """A cache with garbage in every block that no table names, and tables in shuffled order."""

    def __init__(
        self,
        kv_lens: list[int],
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        width = -(-max(kv_lens) // block_size) + 1
        num_blocks = width * len(kv_lens)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(9))
        self.tables = order.view(len(kv_lens), width).int().to(DEVICE)
        self.kv_lens = int32(kv_lens)
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k, self.v = randn(*shape, seed=10, dtype=dtype), randn(*shape, seed=11, dtype=dtype)
        position = torch.arange(width * block_size, device=DEVICE).view(width, block_size)
        for table, length in zip(self.tables.long(), kv_lens, strict=True):
            for cache in (self.k, self.v):
                cache[table] = cache[table].masked_fill((position >= length)[:, :, None, None], float("nan"))


def decode(q: Tensor, cache: Paged, window: int | None = None) -> tuple[Tensor, DecodeWorkspace]:
    workspace = DecodeWorkspace.allocate(
        max_sequences=q.shape[0], num_heads=q.shape[1], num_kv_heads=cache.k.shape[2], head_dim=q.shape[2],
        device=DEVICE,
    )  # fmt: skip
    out = paged_decode(q, cache.k, cache.v, cache.tables, cache.kv_lens, workspace, window=window)
    return out, workspace


def expected_decode(q: Tensor, cache: Paged, window: int | None = None) -> Tensor:
    starts = int32(list(range(q.shape[0] + 1)))
    return paged_attention_ref(q, cache.k, cache.v, cache.tables, starts, cache.kv_lens, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_decode_over_short_and_split_sequences(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = heads
    cache = Paged([1, 16, 100, 300, 129], num_kv_heads, head_dim, dtype=dtype)
    q = randn(5, num_heads, head_dim, seed=1, dtype=dtype)
    out, workspace = decode(q, cache)
    assert_close(out, expected_decode(q, cache))
    assert not bool(workspace.counters.any())


@pytest.mark.parametrize("window", [1, 20, 200])
def test_decode_sees_only_its_window(window: int) -> None:
    cache = Paged([5, 64, 290], 2, 64)
    q = randn(3, 4, 64, seed=2)
    assert_close(decode(q, cache, window)[0], expected_decode(q, cache, window))


def test_decode_joins_as_many_splits_as_there_can_be() -> None:
    cache = Paged([1, 1500], 2, 64, block_size=32)
    q = randn(2, 2, 64, seed=3)
    workspace = DecodeWorkspace(
        torch.empty(2, 2, 4, 1, 64, device=DEVICE), torch.empty(2, 2, 4, 1, device=DEVICE), int32([0] * 4).view(2, 2)
    )
    out = paged_decode(q, cache.k, cache.v, cache.tables, cache.kv_lens, workspace)
    assert_close(out, expected_decode(q, cache))


def test_a_row_without_keys_becomes_zeros() -> None:
    cache = Paged([0, 40, 0], 1, 64)
    q = randn(3, 2, 64, seed=4)
    out = decode(q, cache)[0]
    assert not bool(out[0].any())
    assert not bool(out[2].any())
    assert_close(out[1:2], expected_decode(q, cache)[1:2])


def test_a_row_has_the_same_bits_alone_and_in_any_batch() -> None:
    lens = [700, 3, 260, 130]
    cache = Paged(lens, 1, 64)
    q = randn(4, 4, 64, seed=5)
    together = decode(q, cache)[0]
    for row, length in enumerate(lens):
        alone = Paged.__new__(Paged)
        alone.k, alone.v = cache.k, cache.v
        alone.tables, alone.kv_lens = cache.tables[row : row + 1, : -(-length // 16)], cache.kv_lens[row : row + 1]
        assert torch.equal(decode(q[row : row + 1], alone)[0][0], together[row])


def test_queries_may_be_a_slice_of_wider_rows() -> None:
    cache = Paged([30, 31], 1, 64)
    wide = randn(2, 4, 64, seed=6)
    q = wide.view(2, -1)[:, :128].view(2, 2, 64)
    assert_close(decode(q, cache)[0], expected_decode(q.contiguous(), cache))
    out = paged_prefill(q, cache.k, cache.v, cache.tables, int32([0, 1, 2]), cache.kv_lens, max_query_len=1)
    assert_close(out, expected_decode(q.contiguous(), cache))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 24])
def test_prefill_with_and_without_a_prefix(heads: tuple[int, int, int], window: int | None, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = heads
    # A whole prompt, one row, a chunk behind a prefix, a sequence without rows, and a last chunk.
    query_lens, kv_lens = [70, 1, 33, 0, 5], [70, 45, 96, 20, 150]
    starts = int32([0, 70, 71, 104, 104, 109])
    cache = Paged(kv_lens, num_kv_heads, head_dim, dtype=dtype)
    q = randn(sum(query_lens), num_heads, head_dim, seed=7, dtype=dtype)
    out = paged_prefill(
        q, cache.k, cache.v, cache.tables, starts, cache.kv_lens, max_query_len=max(query_lens), window=window
    )
    assert_close(out, paged_attention_ref(q, cache.k, cache.v, cache.tables, starts, cache.kv_lens, window=window))


def test_prefill_leaves_padding_rows_alone() -> None:
    cache = Paged([10], 1, 64)
    q, out = randn(16, 1, 64, seed=8), torch.full((16, 1, 64), 7.0, device=DEVICE)
    paged_prefill(q, cache.k, cache.v, cache.tables, int32([0, 10]), cache.kv_lens, max_query_len=16, out=out)
    assert bool((out[10:] == 7).all())
    expected = paged_attention_ref(q[:10], cache.k, cache.v, cache.tables, int32([0, 10]), cache.kv_lens)
    assert_close(out[:10], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 700])
def test_long_sequences_on_a_device(window: int | None, dtype: torch.dtype) -> None:
    cache = Paged([2048, 1, 777, 5000, 128], 8, 128, dtype=dtype)
    q = randn(5, 32, 128, seed=12, dtype=dtype)
    first = decode(q, cache, window)[0]
    assert_close(first, expected_decode(q, cache, window))
    assert torch.equal(first, decode(q, cache, window)[0])
    query_lens = [1024, 1, 512, 1000, 128]
    starts = int32([0, 1024, 1025, 1537, 2537, 2665])
    q = randn(sum(query_lens), 32, 128, seed=13, dtype=dtype)
    out = paged_prefill(q, cache.k, cache.v, cache.tables, starts, cache.kv_lens, max_query_len=1024, window=window)
    assert_close(out, paged_attention_ref(q, cache.k, cache.v, cache.tables, starts, cache.kv_lens, window=window))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_replayed_graph_sees_the_key_that_the_launch_ahead_wrote() -> None:
    cache = Paged([200, 40, 513], 2, 128, dtype=torch.bfloat16)
    qkv = randn(16, 3, (8 + 2 * 2) * 128, seed=14, dtype=torch.bfloat16)
    positions = cache.kv_lens.long() - 1
    slots = cache.tables[torch.arange(3), positions // 16].long() * 16 + positions % 16
    cos, sin = torch.rand(2, 600, 64, device=DEVICE)
    workspace = DecodeWorkspace.allocate(max_sequences=3, num_heads=8, num_kv_heads=2, head_dim=128, device=DEVICE)
    rows, out = qkv.clone(), torch.zeros(16, 3, 8, 128, device=DEVICE, dtype=torch.bfloat16)

    def steps() -> None:
        for step in range(16):
            rope_and_cache(rows[step], positions, cos, sin, slots, cache.k, cache.v)
            q = rows[step, :, : 8 * 128].view(3, 8, 128)
            paged_decode(q, cache.k, cache.v, cache.tables, cache.kv_lens, workspace, out=out[step])

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    rows.copy_(qkv)
    out.zero_()
    graph.replay()
    for step in range(16):
        expected = qkv[step].clone()
        rope_and_cache_ref(expected, positions, cos, sin, slots, cache.k, cache.v)
        assert_close(out[step], expected_decode(expected[:, : 8 * 128].view(3, 8, 128), cache))
