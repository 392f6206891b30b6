"""Decode rows draw on the device what the plain sampler draws from the same logits, whatever each row asks for."""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_support import DEVICE, randn

from loraplex_server.engine.row_sampling import Drawing, RowSampling, drawing_of  # isort: skip
from loraplex_server.engine.sampler import Sampled, Sampler  # isort: skip
from loraplex_server.engine.sequence import Request, SamplingParams, Sequence
from loraplex_server.kernels.sampling import SamplingMode

VOCAB, MAX_ROWS = 300, 6
EOS = frozenset({7, 9})

ASKS: dict[str, dict[str, object]] = {
    "nothing": {},
    "biases": {"logit_bias": ((5, 40.0), (6, -100.0), (299, 39.5))},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    "penalties and biases": {"frequency_penalty": 5.0, "logit_bias": ((5, 40.0), (8, 36.0))},
    "length": {"min_tokens": 4, "stop_token_ids": (11, 5), "logit_bias": ((7, 50.0), (5, 49.0), (3, 48.0))},
    "length, end ignored": {"min_tokens": 3, "ignore_eos": True, "stop_token_ids": (11,), "logit_bias": ((7, 50.0),)},
    "scores": {"num_logprobs": 5},
    "the chosen one's score": {"num_logprobs": 0, "presence_penalty": 1.5},
    "filters": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
    "temperature and penalties": {"temperature": 1.2, "repetition_penalty": 1.2, "seed": 4, "num_logprobs": 20},
}


def sequence(name: str, index: int) -> Sequence:
    params = SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **ASKS[name]})  # type: ignore[arg-type]
    prompt = tuple((index * 31 + i * 7) % VOCAB for i in range(3 + index))
    return Sequence(Request(f"{name} {index}", prompt, params), seed=100 + index, arrival_s=0.0)


def row_sampling() -> RowSampling:
    return RowSampling(max_rows=MAX_ROWS, vocab_size=VOCAB, eos_ids=EOS, dtype=torch.float32, device=DEVICE)


def step(sampling: RowSampling, seqs: list[Sequence], drawing: Drawing, logits: Tensor) -> list[Sampled]:
    """One step of rows that are seated, and of one that nobody has."""
    lens = [len(seq.tokens) for seq in seqs]
    kv_lens = torch.tensor([*lens, 0], dtype=torch.int32, device=DEVICE)
    sampling.draw(logits, (kv_lens.long() - 1).clamp(min=0), kv_lens, drawing)
    rows = list(enumerate(seqs))
    sampling.launched(rows, drawing)
    drawn = sampling.fetch(0, len(seqs) + 1, drawing)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return [sampled for _, sampled in drawn.read(rows)]


def assert_same(got: list[Sampled], expected: list[Sampled]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.token_id, mine.finite) == (theirs.token_id, theirs.finite)
        assert (mine.logprob is None) == (theirs.logprob is None)
        if mine.logprob is not None and theirs.logprob is not None:
            assert mine.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-4)
            assert [i for i, _ in mine.logprob.top] == [i for i, _ in theirs.logprob.top]
            assert [p for _, p in mine.logprob.top] == pytest.approx([p for _, p in theirs.logprob.top], abs=1e-4)


@pytest.mark.parametrize(
    "names",
    [
        ["nothing", "biases", "penalties"],
        ["length", "length, end ignored", "nothing"],
        ["penalties and biases", "scores", "the chosen one's score"],
        ["filters", "temperature and penalties", "length", "nothing"],
    ],
)
def test_rows_draw_what_the_plain_sampler_draws(names: list[str]) -> None:
    sampling, plain = row_sampling(), Sampler(EOS)
    seqs = [sequence(name, i) for i, name in enumerate(names)]
    for seq in seqs:
        seq.tokens += [5, 5, seq.tokens[0]]  # an answer begun elsewhere
    drawing = sampling.seat(seqs)
    for number in range(6):
        logits = 3 * randn(len(seqs) + 1, VOCAB, seed=number)
        expected = plain.read(plain.draw(logits[:-1], seqs), seqs)
        got = step(sampling, seqs, drawing, logits)
        assert_same(got, expected)
        for seq, sampled in zip(seqs, got, strict=True):
            seq.tokens.append(sampled.token_id)


def test_counts_follow_a_sequence_to_another_row_and_through_steps_elsewhere() -> None:
    sampling, plain = row_sampling(), Sampler(EOS)
    first, second = sequence("penalties", 0), sequence("penalties and biases", 1)
    for number, seqs in enumerate(
        [[first, second], [second, first], [first], [sequence("biases", 3)], [first, second]]
    ):
        drawing = sampling.seat(seqs)
        for again in range(2):
            logits = 3 * randn(len(seqs) + 1, VOCAB, seed=10 * number + again)
            expected = plain.read(plain.draw(logits[:-1], seqs), seqs)
            got = step(sampling, seqs, drawing, logits)
            assert_same(got, expected)
            for seq, sampled in zip(seqs, got, strict=True):
                seq.tokens.append(sampled.token_id)
        first.tokens.append(number)  # drawn by a step that was none of the rows'


def test_a_row_that_is_no_number_says_so_alone() -> None:
    sampling = row_sampling()
    seqs = [sequence(name, i) for i, name in enumerate(("penalties", "scores", "biases"))]
    logits = randn(4, VOCAB, seed=1)
    logits[1, 17] = float("nan")
    got = step(sampling, seqs, sampling.seat(seqs), logits)
    assert [sampled.finite for sampled in got] == [True, False, True]


def test_a_step_does_no_more_than_its_rows_ask_for() -> None:
    greedy, filtered = sequence("nothing", 0), sequence("filters", 1)
    assert drawing_of([greedy]) == Drawing(SamplingMode.GREEDY, adjusts=False, scores=False)
    assert drawing_of([greedy, filtered]) == Drawing(SamplingMode.FILTERED, adjusts=False, scores=False)
    long = sequence("length", 0)
    assert drawing_of([long]).adjusts
    long.tokens += [1, 2, 3, 4]
    assert drawing_of([sequence("scores", 0)]).scores
    assert not drawing_of([sequence("length, end ignored", 0), greedy]).scores


def test_more_than_the_tables_hold_is_not_taken() -> None:
    sampling = row_sampling()
    too_many = SamplingParams(max_tokens=5, logit_bias=tuple((i, 1.0) for i in range(513)))
    assert not sampling.takes(Sequence(Request("r", (1,), too_many), 0, 0.0))
    assert not sampling.takes(Sequence(Request("r", (1,), SamplingParams(max_tokens=5, num_logprobs=21)), 0, 0.0))
    assert all(sampling.takes(sequence(name, 0)) for name in ASKS)
