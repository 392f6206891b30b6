"""The planned attention equals the reference over random batches, and keeps sequences apart."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.kernels.attention_ref import paged_attention_ref
from loraplex_server.model.attention import AttentionPlan
from loraplex_server.model.batch import Batch

BLOCK_SIZE, NUM_BLOCKS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 64, 4, 2, 8

sequences = st.lists(
    st.tuples(st.integers(0, 30), st.one_of(st.just(1), st.integers(2, 12))), min_size=1, max_size=6
)  # (tokens cached before, rows now)


def make_batch(parts: list[tuple[int, int]], tables: list[list[int]]) -> Batch:
    lens = [rows for _, rows in parts]
    positions = [range(prefix, prefix + rows) for prefix, rows in parts]
    slots = [
        table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        for table, places in zip(tables, positions, strict=True)
        for p in places
    ]
    totals = [prefix + rows for prefix, rows in parts]
    width = max(map(len, tables))
    return Batch(
        token_ids=torch.zeros(sum(lens), dtype=torch.int64),
        positions=torch.tensor([p for places in positions for p in places]),
        kv_slots=torch.tensor(slots),
        query_starts=torch.tensor([sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32),
        kv_lens=torch.tensor(totals, dtype=torch.int32),
        block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
        token_adapters=torch.full((sum(lens),), -1, dtype=torch.int32),
        logit_rows=torch.zeros(0, dtype=torch.int64),
        query_lens=tuple(lens),
        prefix_and_query_lens=tuple(totals),
        segments=(),
    )


def deal_blocks(parts: list[tuple[int, int]]) -> list[list[int]]:
    order = torch.randperm(NUM_BLOCKS).tolist()
    return [[order.pop() for _ in range(-(-(prefix + rows) // BLOCK_SIZE))] for prefix, rows in parts]


@settings(max_examples=150, deadline=None)
@given(parts=sequences, window=st.one_of(st.none(), st.integers(1, 40)), seed=st.integers(0, 2**16))
def test_any_batch_equals_the_reference(parts: list[tuple[int, int]], window: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch(parts, deal_blocks(parts))
    k_blocks = torch.randn(NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    v_blocks = torch.randn_like(k_blocks)
    q = torch.randn(batch.num_tokens, NUM_HEADS, HEAD_DIM)
    k, v = torch.randn(2, batch.num_tokens, NUM_KV_HEADS, HEAD_DIM)
    plans = AttentionPlan.build_all(batch, block_size=BLOCK_SIZE, windows=[None, window], dtype=torch.float32)
    found = plans[window].run(q, k, v, k_blocks, v_blocks)
    assert torch.equal(k_blocks.flatten(0, 1)[batch.kv_slots], k)
    assert torch.equal(v_blocks.flatten(0, 1)[batch.kv_slots], v)
    wanted = paged_attention_ref(
        q, k_blocks, v_blocks, batch.block_tables, batch.query_starts, batch.kv_lens, window=window
    )
    torch.testing.assert_close(found.view(q.shape), wanted, rtol=1e-4, atol=1e-5)


def test_windows_longer_than_every_sequence_share_the_full_plan() -> None:
    parts = [(5, 1), (0, 9)]
    batch = make_batch(parts, deal_blocks(parts))
    plans = AttentionPlan.build_all(batch, block_size=BLOCK_SIZE, windows=[None, 9, 8], dtype=torch.float32)
    assert plans[9] is plans[None]
    assert plans[8] is not plans[None]


def test_short_sequences_are_not_padded_to_a_much_longer_one() -> None:
    parts = [(99, 1), (7, 1), (3, 1), (60, 1)]
    batch = make_batch(parts, deal_blocks(parts))
    plan = AttentionPlan.build(batch, block_size=BLOCK_SIZE, window=None, dtype=torch.float32)
    gathered = sum(group.block_ids.numel() for group in plan.decodes)
    assert gathered <= 2 * sum(-(-(prefix + 1) // BLOCK_SIZE) for prefix, _ in parts)


def test_what_overflowed_in_a_block_does_not_reach_its_next_owner() -> None:
    k_blocks = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    v_blocks = torch.zeros_like(k_blocks)
    sick = make_batch([(0, 8)], [[0, 1]])
    nans = torch.full((8, NUM_KV_HEADS, HEAD_DIM), float("nan"))
    infinities = torch.full_like(nans, float("inf"))
    q = torch.randn(8, NUM_HEADS, HEAD_DIM)
    sick_plan = AttentionPlan.build(sick, block_size=BLOCK_SIZE, window=None, dtype=torch.float32)
    sick_plan.run(q, nans, infinities, k_blocks, v_blocks)
    # Two sequences of different lengths: the shorter one is padded with block 0, and the longer one owns block 1.
    healthy = make_batch([(2, 1), (4, 1)], [[2], [3, 1]])
    k, v = torch.randn(2, 2, NUM_KV_HEADS, HEAD_DIM)
    plan = AttentionPlan.build(healthy, block_size=BLOCK_SIZE, window=None, dtype=torch.float32)
    assert plan.run(q[:2], k, v, k_blocks, v_blocks).isfinite().all()
