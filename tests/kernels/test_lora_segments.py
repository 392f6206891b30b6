"""Adapter deltas of prompts against their definition: any segments, any ranks, split sums and activation included."""

from tests.kernels.triton_support import DEVICE, DTYPES, assert_close, randn

# isort: split
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.kernels.activation_ref import silu_mul_ref
from loraplex_server.kernels.lora_rows_ref import RowGroups, empty_table, lora_rows_ref
from loraplex_server.kernels.lora_segments import (
    GroupFactors,
    RowTiles,
    SegmentWorkspace,
    cut_rows,
    lora_add,
    lora_silu_mul,
)

K = 192
Ranks = tuple[int, ...]
Segments = list[tuple[int, int, int]]


def make_factors(part_sizes: tuple[int, ...], adapters: list[Ranks], dtype: torch.dtype) -> GroupFactors:
    """Adapters with these ranks (multiples of 8, 0: not there) one behind the other, as the engine packs them."""
    table, images, offset = empty_table(len(adapters), DEVICE), [], 0
    for slot, ranks in enumerate(adapters):
        size = sum(ranks) * K + sum(n * r for n, r in zip(part_sizes, ranks, strict=True))
        table[slot, : 2 + len(ranks)] = torch.tensor([offset, sum(ranks), *ranks])
        images.append(randn(size, seed=slot, dtype=dtype) * 0.1)
        offset += size
    arena = torch.cat([*images, torch.zeros(1, dtype=dtype, device=DEVICE)])
    return GroupFactors(arena, table, part_sizes)


def make_rows(segments: Segments, num_rows: int, adapters: list[Ranks]) -> RowTiles:
    tiles = torch.tensor(cut_rows(segments, num_rows), dtype=torch.int32, device=DEVICE)
    most = max([8, *(sum(adapters[slot]) for _, _, slot in segments if slot >= 0)])
    return RowTiles(tiles, most)


def as_groups(segments: Segments, num_rows: int) -> RowGroups:
    slots = [slot for _, _, slot in segments]
    order = [row for start, stop, _ in segments for row in range(start, stop)]
    starts = [0]
    for start, stop, _ in segments:
        starts.append(starts[-1] + stop - start)
    return RowGroups(*(torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in (slots, starts, order)))


def compare(
    part_sizes: tuple[int, ...], adapters: list[Ranks], segments: Segments, num_rows: int, dtype: torch.dtype
) -> None:
    factors, rows = make_factors(part_sizes, adapters, dtype), make_rows(segments, num_rows, adapters)
    x = randn(num_rows, K, seed=1, dtype=dtype)
    out = randn(num_rows, sum(part_sizes), seed=2, dtype=dtype)
    workspace = SegmentWorkspace.allocate(max_rows=num_rows, rank_capacity=rows.most_ranks, dtype=dtype, device=DEVICE)
    for buffer in (workspace.shrunk, workspace.partial):
        buffer.fill_(float("nan"))
    expected = out.clone()
    lora_rows_ref(expected, x, factors.arena, factors.table, as_groups(segments, num_rows), part_sizes)
    if len(part_sizes) == 2:
        found = torch.full((num_rows, part_sizes[0]), float("nan"), dtype=dtype, device=DEVICE)
        assert_close(lora_silu_mul(out, x, factors, rows, workspace, out=found), silu_mul_ref(expected))
    lora_add(out, x, factors, rows, workspace)
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "segments",
    [[(0, 70, 0)], [(3, 40, 1), (40, 70, 2)], [(0, 1, 2), (1, 2, 0), (64, 70, 1)], []],
    ids=["one", "base-first", "scattered", "all-base"],
)
@pytest.mark.parametrize("part_sizes", [(80, 32, 32), (144, 144), (136,)], ids=["three", "gate-up", "one-part"])
def test_each_segment_gets_its_own_adapter(part_sizes: tuple[int, ...], segments: Segments, dtype: torch.dtype) -> None:
    adapters = [(8, 16, 24)[: len(part_sizes)], (24, 0, 72)[: len(part_sizes)], (0, 8, 0)[: len(part_sizes)]]
    compare(part_sizes, adapters, segments, 70, dtype)


@given(data=st.data(), num_rows=st.integers(1, 150))
@settings(max_examples=10, deadline=None)
def test_random_segments_and_ranks(data: st.DataObject, num_rows: int) -> None:
    part_sizes = data.draw(st.sampled_from([(48, 16, 16), (40, 40), (24,)]))
    ranks = st.tuples(*[st.integers(0, 5).map(lambda r: 8 * r)] * len(part_sizes))
    adapters = data.draw(st.lists(ranks, min_size=3, max_size=3))
    cuts = sorted(data.draw(st.sets(st.integers(0, num_rows), max_size=5)))
    slots = data.draw(st.permutations(range(3)))
    bounds = itertools.pairwise(cuts)
    segments = [(start, stop, slots[i % 3]) for i, (start, stop) in enumerate(bounds) if i < 3]
    compare(part_sizes, adapters, segments, num_rows, torch.float32)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 200), st.integers(0, 3)), max_size=4),
    rest=st.integers(0, 90),
)
def test_tiles_cover_every_row_once_with_its_own_slot(lengths: Segments, rest: int) -> None:
    segments, owners = [], []
    for gap, length, slot in lengths:
        start = len(owners) + gap
        segments.append((start, start + length, slot))
        owners += [-1] * gap + [slot] * length
    owners += [-1] * rest
    found = []
    for first, last, slot in cut_rows(segments, len(owners)):
        assert 0 < last - first <= 64
        assert first == len(found)
        found += [slot] * (last - first)
    assert found == owners


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("segments", [[(0, 1000, 0), (1000, 2000, 1)], [(5, 69, 1)]])
def test_repeats_are_bit_identical(segments: Segments) -> None:
    adapters: list[Ranks] = [(16, 16, 16), (256, 8, 64)]
    factors, rows = make_factors((512, 128, 128), adapters, torch.bfloat16), make_rows(segments, 2048, adapters)
    x, out = randn(2048, K, seed=1, dtype=torch.bfloat16), randn(2048, 768, seed=2, dtype=torch.bfloat16)
    workspace = SegmentWorkspace.allocate(max_rows=2048, rank_capacity=512, dtype=x.dtype, device=DEVICE)
    first = out.clone()
    lora_add(first, x, factors, rows, workspace)
    for _ in range(10):
        again = out.clone()
        lora_add(again, x, factors, rows, workspace)
        assert torch.equal(first, again)
