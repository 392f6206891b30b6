"""Log-probabilities on the device against plain torch."""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_support import DEVICE, DTYPES, randn

from loraplex_server.kernels.sampling_logprobs import NUM_TOP, LogprobWorkspace, logprobs  # isort: skip
from loraplex_server.kernels.sampling_logprobs_ref import logprobs_ref


def run(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    workspace = LogprobWorkspace.allocate(max_rows=rows, vocab_size=vocab, device=DEVICE)
    chosen = torch.full((rows,), 7.0, device=DEVICE)
    values = torch.full((rows, NUM_TOP), 7.0, device=DEVICE)
    ids = torch.full((rows, NUM_TOP), -7, dtype=torch.int32, device=DEVICE)
    logprobs(logits, token_ids, workspace, chosen, values, ids)
    return chosen, values, ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1000, 4096, 5003])
def test_logprobs_are_those_of_the_softmax(vocab: int, dtype: torch.dtype) -> None:
    logits = 3 * randn(3, vocab, seed=0, dtype=dtype)
    token_ids = torch.tensor([0, vocab - 1, 77], device=DEVICE)
    chosen, values, ids = run(logits, token_ids)
    expected = logprobs_ref(logits, token_ids, NUM_TOP)
    torch.testing.assert_close(chosen, expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values, expected[1], rtol=1e-5, atol=1e-4)
    # Ids of equal values may come in any order, so they are judged by their values.
    of_ids = logprobs_ref(logits, token_ids, 1)[1][:, :1] + logits.float().gather(1, ids.long())
    torch.testing.assert_close(of_ids - logits.float().amax(dim=1, keepdim=True), values, rtol=1e-5, atol=1e-4)
    assert all(len(set(row)) == NUM_TOP for row in ids.tolist())


def test_equal_values_come_in_the_order_of_their_ids() -> None:
    logits = torch.zeros(1, 9000, device=DEVICE)
    logits[0, [8500, 12, 4097]] = 5.0
    assert run(logits, torch.tensor([3], device=DEVICE))[2][0, :6].tolist() == [12, 4097, 8500, 0, 1, 2]


def test_a_small_vocabulary_ends_in_nothing() -> None:
    logits = randn(1, 12, seed=1)
    _, values, ids = run(logits, torch.tensor([3], device=DEVICE))
    assert sorted(ids[0, :12].tolist()) == list(range(12))
    assert bool((values[0, 12:] == float("-inf")).all())


def test_forbidden_tokens_have_no_share() -> None:
    logits = torch.full((1, 5000), float("-inf"), device=DEVICE)
    logits[0, 4500] = 2.0
    chosen, values, ids = run(logits, torch.tensor([4500], device=DEVICE))
    assert float(chosen[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(values[0, 0]) == pytest.approx(0.0, abs=1e-6)
    assert int(ids[0, 0]) == 4500
