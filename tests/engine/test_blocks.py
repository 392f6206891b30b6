"""The KV block pool: what is handed out, found again, evicted, and kept apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.engine.blocks import NULL_BLOCK, BlockPool
from loraplex_server.engine.sequence import Request, SamplingParams, Sequence


def sequence(tokens: list[int], adapter: str | None = None, salt: str = "", **sampling: int) -> Sequence:
    return Sequence(Request("r", tuple(tokens), SamplingParams(max_tokens=8, **sampling), adapter, salt), 0, 0.0)


def compute(pool: BlockPool, seq: Sequence) -> None:
    assert pool.grow(seq, len(seq.tokens))
    seq.num_computed = len(seq.tokens)
    pool.commit(seq)


def cached_after(first: Sequence, second: Sequence) -> int:
    """Tokens that ``second`` finds in the cache after ``first`` was computed and has left."""
    pool = BlockPool(64, 4)
    compute(pool, first)
    pool.release(first)
    pool.attach_prefix(second)
    return second.num_computed


def test_a_repeated_prompt_is_found_but_its_last_token_is_computed_again() -> None:
    assert cached_after(sequence(list(range(12))), sequence(list(range(12)))) == 8
    assert cached_after(sequence(list(range(13))), sequence(list(range(13)))) == 12


def test_forgotten_blocks_are_free_and_found_by_nobody_while_their_users_keep_theirs() -> None:
    pool, left, stays = BlockPool(64, 4), sequence(list(range(12))), sequence(list(range(100, 112)))
    for seq in (left, stays):
        compute(pool, seq)
    kept = list(stays.block_ids)
    pool.release(left)
    pool.forget()
    assert stays.block_ids == kept
    assert pool.num_used == 3
    for tokens in (left.tokens, stays.tokens):
        later = sequence(tokens)
        pool.attach_prefix(later)
        assert later.num_computed == 0
    pool.release(stays)
    assert pool.num_free == pool.num_blocks


def test_a_common_head_is_found_up_to_the_first_difference() -> None:
    assert cached_after(sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]), sequence([1, 2, 3, 4, 5, 6, 7, 0, 9])) == 4


@pytest.mark.parametrize(
    ("adapter", "salt"), [("b" * 64, ""), (None, ""), ("a" * 64, "tenant"), ("a" * 63, "a"), ("a" * 65, "")]
)
def test_prefixes_are_private_to_adapter_version_and_tenant(adapter: str | None, salt: str) -> None:
    tokens = list(range(20))
    assert cached_after(sequence(tokens, "a" * 64), sequence(tokens, "a" * 64)) == 16
    assert cached_after(sequence(tokens, "a" * 64), sequence(tokens, adapter, salt)) == 0


def test_prompts_whose_logprobs_are_wanted_are_computed_whole() -> None:
    assert cached_after(sequence(list(range(12))), sequence(list(range(12)), num_prompt_logprobs=0)) == 0


def test_without_a_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(16, 4, prefix_cache=False)
    first = sequence(list(range(12)))
    compute(pool, first)
    pool.release(first)
    second = sequence(list(range(12)))
    pool.attach_prefix(second)
    assert second.num_computed == 0
    assert pool.num_free == pool.num_blocks


def test_grow_takes_nothing_when_blocks_lack() -> None:
    pool = BlockPool(4, 4)
    seq = sequence(list(range(13)))
    assert not pool.grow(seq, 13)
    assert seq.block_ids == []
    assert pool.num_free == 3
    assert pool.grow(seq, 12)
    assert NULL_BLOCK not in seq.block_ids


def test_least_recently_used_content_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(5, 4)
    old, new = sequence([1] * 8), sequence([2] * 8)
    compute(pool, old)
    compute(pool, new)
    pool.release(old)
    pool.release(new)
    compute(pool, sequence([3] * 4))  # takes the tail of old
    again = sequence([1] * 9)
    pool.attach_prefix(again)
    assert again.num_computed == 4
    other = sequence([2] * 9)
    pool.attach_prefix(other)
    assert other.num_computed == 8


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30), st.booleans()), max_size=60))
@settings(deadline=None)
def test_blocks_are_never_lost_or_shared_between_different_contents(moves: list[tuple[int, int, bool]]) -> None:
    pool = BlockPool(24, 4)
    live: dict[int, Sequence] = {}
    for name, length, repeat in moves:
        if name in live:
            pool.release(live.pop(name))
            continue
        seq = sequence([0 if repeat else name + 1] * length)
        pool.attach_prefix(seq)
        if not pool.grow(seq, length):
            pool.release(seq)
            continue
        seq.num_computed = length
        pool.commit(seq)
        live[name] = seq
        content: dict[int, tuple[int, ...]] = {}
        for other in live.values():
            for i, block in enumerate(other.block_ids):
                tokens = tuple(other.tokens[: (i + 1) * 4]) if (i + 1) * 4 <= len(other.tokens) else (id(other), i)
                assert content.setdefault(block, tokens) == tokens
        assert pool.num_used == len({block for other in live.values() for block in other.block_ids})
    for seq in live.values():
        pool.release(seq)
    assert pool.num_free == pool.num_blocks
