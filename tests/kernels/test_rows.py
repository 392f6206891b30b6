"""A decode step's inputs against their definition."""

from tests.kernels.triton_support import DEVICE

# isort: split
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.kernels.rows import prepare_rows
from loraplex_server.kernels.rows_ref import prepare_rows_ref

BLOCK_SIZE, WIDTH = 4, 8

ROW = st.tuples(st.integers(-1, 500), st.integers(-1, BLOCK_SIZE * WIDTH - 1), st.integers(-1, 6), st.integers(-1, 90))


def outputs(num_rows: int) -> list[torch.Tensor]:
    longs = [torch.full((num_rows,), -7, device=DEVICE) for _ in range(3)]
    return [*longs, *(torch.full((num_rows,), -7, dtype=torch.int32, device=DEVICE) for _ in range(2))]


@given(st.lists(ROW, min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_any_rows_become_the_same_inputs(values: list[tuple[int, int, int, int]]) -> None:
    # A row without a sequence gets no block either.
    values = [(t, p, a, b if p >= 0 else -1) for t, p, a, b in values]
    packed = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    sampled = torch.arange(1000, 1000 + len(values), device=DEVICE)
    tables = torch.arange(len(values) * WIDTH, dtype=torch.int32, device=DEVICE).view(-1, WIDTH)
    expected_tables, expected, got = tables.clone(), outputs(len(values)), outputs(len(values))
    prepare_rows_ref(packed, sampled, expected_tables, BLOCK_SIZE, *expected)
    prepare_rows(packed, sampled, tables, BLOCK_SIZE, *got)
    for mine, theirs in zip([tables, *got], [expected_tables, *expected], strict=True):
        assert torch.equal(mine, theirs)


def test_a_known_token_wins_over_the_sampled_one_and_a_new_block_enters_the_table() -> None:
    packed = torch.tensor([[5, 4, 2, 77], [-1, 3, -1, -1], [-1, -1, -1, -1]], dtype=torch.int32, device=DEVICE)
    sampled = torch.tensor([100, 101, 102], device=DEVICE)
    tables = torch.zeros(3, WIDTH, dtype=torch.int32, device=DEVICE)
    token_ids, positions, kv_slots, kv_lens, adapters = got = outputs(3)
    prepare_rows(packed, sampled, tables, BLOCK_SIZE, *got)
    assert token_ids.tolist() == [5, 101, 0]
    assert positions.tolist() == [4, 3, 0]
    assert kv_slots.tolist() == [77 * BLOCK_SIZE, 3, -1]
    assert kv_lens.tolist() == [5, 4, 0]
    assert adapters.tolist() == [2, -1, -1]
    assert tables[0, 1] == 77
