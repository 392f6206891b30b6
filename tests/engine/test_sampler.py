"""Logits to tokens: each row by its own parameters."""

import math

import pytest
import torch
from torch import Tensor

from loraplex_server.engine.sampler import Sampler
from loraplex_server.engine.sequence import Request, SamplingParams, Sequence

EOS = 3


def row(tokens: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), seed: int = 0, **params: object) -> Sequence:
    sampling = SamplingParams(max_tokens=16, **params)  # type: ignore[arg-type]
    seq = Sequence(Request("r", tokens, sampling), seed, 0.0)
    seq.tokens += output
    return seq


def draw(logits: Tensor, *seqs: Sequence) -> list[int]:
    sampler = Sampler(frozenset({EOS}))
    return [sampled.token_id for sampled in sampler.read(sampler.draw(logits, seqs), seqs)]


def distribution(probs: list[float], num_draws: int = 20_000, **params: object) -> Tensor:
    logits = torch.tensor(probs).log().repeat(num_draws, 1)
    seqs = [row(seed=seed, **{"temperature": 1.0, **params}) for seed in range(num_draws)]
    return torch.bincount(torch.tensor(draw(logits, *seqs)), minlength=len(probs)) / num_draws


PROBS = [0.5, 0.3, 0.15, 0.05]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"min_p": 0.2}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_filtered_distribution(params: dict[str, float], expected: list[float]) -> None:
    torch.testing.assert_close(
        distribution(PROBS, **params), torch.tensor(expected, dtype=torch.float32), atol=0.012, rtol=0
    )


def test_a_seed_draws_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    seqs = [row(seed=i, temperature=1.0, top_p=0.9 if i % 2 else 1.0, top_k=40 if i % 3 else 0) for i in range(8)]
    together = draw(logits, *seqs)
    assert together == [draw(logits[i : i + 1], seq)[0] for i, seq in enumerate(seqs)]


def test_the_same_seed_draws_differently_at_each_position() -> None:
    logits = torch.zeros(200, 1000)
    tokens = draw(logits, *[row(tokens=tuple(range(n + 1)), temperature=1.0) for n in range(200)])
    assert len(set(tokens)) > 150


def test_greedy_takes_the_first_of_equals() -> None:
    assert draw(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), row(temperature=0.0)) == [1]


def test_logit_bias_moves_the_choice() -> None:
    logits = torch.zeros(1, 6)
    assert draw(logits, row(temperature=0.0, logit_bias=((4, 5.0), (2, -100.0)))) == [4]
    assert logits.eq(0).all()  # the model's own logits are not touched


def test_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8, -2.0]])
    # Repetition looks at the prompt too; presence and frequency only at the answer.
    assert draw(logits, row(tokens=(0,), temperature=0.0, repetition_penalty=1.2)) == [1]
    assert draw(logits, row(tokens=(0,), temperature=0.0, presence_penalty=1.0)) == [0]
    assert draw(logits, row(tokens=(3,), output=(0,), temperature=0.0, presence_penalty=0.15)) == [1]
    assert draw(logits, row(tokens=(3,), output=(0, 0, 1), temperature=0.0, frequency_penalty=0.08)) == [0]
    assert draw(logits, row(tokens=(3,), output=(0, 0, 1), temperature=0.0, frequency_penalty=0.15)) == [2]


def test_no_end_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    assert draw(logits, row(temperature=0.0)) == [EOS]
    assert draw(logits, row(temperature=0.0, min_tokens=1)) == [2]
    assert draw(logits, row(temperature=0.0, min_tokens=1, stop_token_ids=(2,))) == [1]
    assert draw(logits, row(temperature=0.0, min_tokens=1, ignore_eos=True)) == [EOS]
    assert draw(logits, row(output=(1,), temperature=0.0, min_tokens=1)) == [EOS]


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    seqs = (
        row(temperature=0.3, top_k=5, logit_bias=((7, 100.0),), num_logprobs=3),
        row(temperature=0.0, num_logprobs=0),
    )
    sampler = Sampler(frozenset())
    first, second = sampler.read(sampler.draw(logits, seqs), seqs)
    expected = logits.log_softmax(dim=1)
    assert first.token_id == 7
    assert first.logprob is not None
    assert math.isclose(first.logprob.logprob, expected[0, 7].item(), abs_tol=1e-5)
    assert [token for token, _ in first.logprob.top] == expected[0].topk(3).indices.tolist()
    assert second.logprob is not None
    assert second.logprob.top == ()
    assert math.isclose(second.logprob.logprob, expected[1].max().item(), abs_tol=1e-5)


def test_values_that_are_not_numbers_are_noticed_in_their_row_only() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4] = float("nan")
    seqs = [row(temperature=t) for t in (0.0, 0.0, 1.0)]
    sampler = Sampler(frozenset())
    assert [s.finite for s in sampler.read(sampler.draw(logits, seqs), seqs)] == [True, False, True]
