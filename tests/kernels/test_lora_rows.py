"""Adapter deltas of decode rows against their definition: any ranks, any mix, one table."""

from tests.kernels.triton_support import DEVICE, DTYPES, TOLERANCE, randn

# isort: split
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraplex_adapters.format import AdapterWeights, LoraFactors
from loraplex_server.engine.adapter_image import build_image
from loraplex_server.kernels.lora import LoraWorkspace, lora_rows
from loraplex_server.kernels.lora_ref import lora_add_ref
from loraplex_server.kernels.lora_rows_ref import RowGroups, empty_table, group_rows, lora_rows_ref
from tests.engine.support import BASE

PART_SIZES = (16, 8, 8)
LINEARS = ("q_proj", "k_proj", "v_proj")


def make_rows(slots: list[int]) -> RowGroups:
    groups = group_rows(slots, len(slots))
    return RowGroups(*(torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in groups))


def make_arena(ranks: list[tuple[int, int, int]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One adapter a slot with these ranks of q, k and v at layer 0 (0: not there), packed as the engine packs them."""
    images, table, offset = [], empty_table(len(ranks), DEVICE), 0
    for slot, own in enumerate(ranks):
        factors = {
            (0, name): LoraFactors(randn(rank, 16, seed=slot).cpu(), randn(n, rank, seed=slot + 99).cpu(), 0.5)
            for name, n, rank in zip(LINEARS, PART_SIZES, own, strict=True)
            if rank
        }
        if not factors:
            continue
        image = build_image(AdapterWeights(factors), BASE, dtype, pinned=False)
        place = image.layout.groups[0, "qkv"]
        by_column = {part.col_start: part.rank for part in place.parts}
        padded = [by_column.get(column, 0) for column in (0, 16, 24)]
        table[slot, :5] = torch.tensor([offset + place.offset, place.rank, *padded])
        images.append(image.data)
        offset += image.data.numel()
    data = torch.cat(images) if images else torch.zeros(1, dtype=dtype)
    return data.to(DEVICE), table


def compare(slots: list[int], ranks: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    arena, table = make_arena(ranks, dtype)
    rows = make_rows(slots)
    x, out = randn(len(slots), 16, seed=1, dtype=dtype), randn(len(slots), 32, seed=2, dtype=dtype)
    expected = out.clone()
    lora_rows_ref(expected, x, arena, table, rows, PART_SIZES)
    capacity = max(8, int(table[:, 1].max()))  # what the engine sees to: no adapter's stacked ranks are more
    workspace = LoraWorkspace.allocate(max_rows=len(slots), rank_capacity=capacity, device=DEVICE)
    workspace.partial.fill_(float("nan"))
    lora_rows(out, x, arena, table, rows, PART_SIZES, workspace)
    difference = (out.double() - expected.double()).norm() / expected.double().norm()
    assert difference <= TOLERANCE[dtype], difference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "slots",
    [[0], [-1], [0, 0, 0], [0, 1, 2], [2, -1, 0, 2, 1, -1], [1] * 19, list(range(3)) * 7, [-1] * 4],
    ids=["one", "base", "same", "distinct", "mixed", "more-than-a-tile", "many", "all-base"],
)
def test_rows_get_their_own_adapters(slots: list[int], dtype: torch.dtype) -> None:
    compare(slots, [(8, 8, 8), (3, 0, 17), (0, 0, 0)], dtype)


@given(
    slots=st.lists(st.integers(-1, 3), min_size=1, max_size=20),
    ranks=st.lists(st.tuples(*[st.integers(0, 20)] * 3), min_size=4, max_size=4),
)
@example(slots=[2, 0], ranks=[(0, 0, 1), (0, 0, 0), (17, 17, 17), (0, 0, 0)])  # 72 ranks once each is padded to 24
@settings(max_examples=15, deadline=None)
def test_random_mixes_and_ranks(slots: list[int], ranks: list[tuple[int, int, int]]) -> None:
    compare(slots, ranks, torch.float32)


def test_the_tables_definition_is_that_of_segments() -> None:
    ranks = [(8, 5, 3)]
    arena, table = make_arena(ranks, torch.float32)
    factors = {
        (0, name): LoraFactors(randn(rank, 16, seed=0).cpu(), randn(n, rank, seed=99).cpu(), 0.5)
        for name, n, rank in zip(LINEARS, PART_SIZES, ranks[0], strict=True)
    }
    image = build_image(AdapterWeights(factors), BASE, torch.float32, pinned=False)
    delta = image.layout.deltas(image.data)[0, "qkv"]
    x = randn(3, 16, seed=3)
    by_table, by_segment = torch.zeros(3, 32, device=DEVICE), torch.zeros(3, 32)
    lora_rows_ref(by_table, x, arena, table, make_rows([0, 0, 0]), PART_SIZES)
    lora_add_ref(by_segment, x.cpu(), [(0, 3, delta)])
    torch.testing.assert_close(by_table.cpu(), by_segment)
