"""Biases and penalties against plain torch."""

import pytest
import torch

from tests.kernels.triton_support import DEVICE, assert_close, randn

from loraplex_server.kernels.penalties import add_bias, count_tokens, forbid, penalize  # isort: skip
from loraplex_server.kernels.penalties_ref import add_bias_ref, count_tokens_ref, forbid_ref, penalize_ref


def test_biases_reach_their_tokens_alone() -> None:
    logits = randn(3, 5000, seed=0)
    ids = torch.tensor([[7, 4999, -1], [-1, -1, -1], [0, -1, 4096]], dtype=torch.int32, device=DEVICE)
    values = torch.tensor([[2.5, -100.0, 9.0], [9.0, 9.0, 9.0], [float("-inf"), 9.0, 1.0]], device=DEVICE)
    expected = logits.clone()
    expected[0, 7] += 2.5
    expected[0, 4999] -= 100.0
    expected[2, 0] = float("-inf")
    expected[2, 4096] += 1.0
    for call in (add_bias, add_bias_ref):
        got = logits.clone()
        call(got, ids, values)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("count_dtype", [torch.int16, torch.int32])
def test_penalties(count_dtype: torch.dtype) -> None:
    logits = 3 * randn(4, 5000, seed=1)
    in_prompt = randn(4, 5000, seed=2) > 1
    counts = randn(4, 5000, seed=3).clamp(0, 3).to(count_dtype)
    repetition = torch.tensor([1.0, 1.3, 1.0, 0.9], device=DEVICE)
    presence = torch.tensor([0.0, 0.0, 0.6, -0.5], device=DEVICE)
    frequency = torch.tensor([0.0, 0.0, 0.2, 0.0], device=DEVICE)
    results = [logits.clone(), logits.clone()]
    for call, result in zip((penalize, penalize_ref), results, strict=True):
        call(result, in_prompt, counts, repetition, presence, frequency)
    assert_close(*results)
    assert torch.equal(results[0][0], logits[0])
    row, token = 2, int((counts[2] > 1).nonzero()[0])
    lowered = logits[row, token] - 0.6 - 0.2 * counts[row, token]
    assert float(results[0][row, token]) == pytest.approx(float(lowered), rel=1e-5)


def test_forbidden_tokens_stay_forbidden() -> None:
    logits = torch.full((1, 64), float("-inf"), device=DEVICE)
    ones = torch.ones(1, device=DEVICE)
    penalize(
        logits,
        torch.ones(1, 64, dtype=torch.bool, device=DEVICE),
        torch.ones(1, 64, dtype=torch.int16, device=DEVICE),
        1.3 * ones,
        ones,
        ones,
    )
    assert bool((logits == float("-inf")).all())


def test_tokens_are_forbidden_until_a_position() -> None:
    logits = randn(3, 5000, seed=5)
    ids = torch.tensor([[7, 4999, -1], [3, -1, -1], [-1, 0, 4096]], dtype=torch.int32, device=DEVICE)
    until = torch.tensor([10, 10, 10], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([9, 10, 0], device=DEVICE)
    expected = logits.clone()
    expected[0, [7, 4999]] = float("-inf")
    expected[2, [0, 4096]] = float("-inf")
    for call in (forbid, forbid_ref):
        got = logits.clone()
        call(got, ids, until, positions)
        assert torch.equal(got, expected)


def test_tokens_of_live_rows_are_counted() -> None:
    counts = torch.zeros(4, 5000, dtype=torch.int16, device=DEVICE)
    counts[0, 7], counts[3, 4999] = 2, 32767
    expected = counts.clone()
    expected[0, 7], expected[1, 0] = 3, 1
    token_ids = torch.tensor([7, 0, 9, 4999], device=DEVICE)
    kv_lens = torch.tensor([5, 1, 0, 8], dtype=torch.int32, device=DEVICE)
    for call in (count_tokens, count_tokens_ref):
        got = counts.clone()
        call(got, token_ids, kv_lens)
        assert torch.equal(got, expected)
