"""The device's sampler against its definition: the same token for the same row, parameters, seed and position."""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_support import DEVICE, ON_GPU, randn

from loraplex_server.kernels.sampling import SampleWorkspace, SamplingMode, sample  # isort: skip
from loraplex_server.kernels.sampling_ref import sample_ref, uniform_ref

Params = tuple[Tensor, Tensor, Tensor, Tensor]


def params(rows: list[tuple[float, int, float, float]]) -> Params:
    """(temperature, top_k, top_p, min_p) of each row."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    floats = [torch.tensor(values, dtype=torch.float32, device=DEVICE) for values in (temperature, top_p, min_p)]
    return floats[0], torch.tensor(top_k, dtype=torch.int64, device=DEVICE), floats[1], floats[2]


def draw(
    logits: Tensor, asked: Params, seeds: Tensor, positions: Tensor, mode: SamplingMode = SamplingMode.FILTERED
) -> tuple[Tensor, Tensor]:
    workspace = SampleWorkspace.allocate(max_rows=logits.shape[0], vocab_size=logits.shape[1], device=DEVICE)
    finite = torch.zeros(logits.shape[0], dtype=torch.bool, device=DEVICE)
    return sample(logits, *asked, seeds, positions, workspace, mode=mode, finite=finite), finite


def assert_same_tokens(
    logits: Tensor, asked: Params, mode: SamplingMode = SamplingMode.FILTERED, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (logits.shape[0],), generator=generator).to(DEVICE)
    positions = torch.randint(0, 2**20, (logits.shape[0],), generator=generator).to(DEVICE)
    tokens, finite = draw(logits, asked, seeds, positions, mode)
    assert bool(finite.all())
    assert torch.equal(tokens, sample_ref(logits.float(), *asked, seeds, positions))


def test_greedy_rows_take_the_lowest_of_equal_ids() -> None:
    logits = randn(3, 9000, seed=0)
    for row, ids in enumerate([(5, 4095), (4096, 8999), (0, 8192)]):
        logits[row, list(ids)] = 50.0
    asked = params([(0.0, 0, 1.0, 0.0)] * 3)
    zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for mode in SamplingMode:
        assert draw(logits, asked, zeros, zeros, mode)[0].tolist() == [5, 4096, 0]


@pytest.mark.parametrize("vocab_size", [7, 4096, 10_001])
@pytest.mark.parametrize("mode", [SamplingMode.PLAIN, SamplingMode.FILTERED])
def test_rows_without_filters(vocab_size: int, mode: SamplingMode) -> None:
    assert_same_tokens(3 * randn(6, vocab_size, seed=1), params([(0.3 * i, 0, 1.0, 0.0) for i in range(6)]), mode)


def test_noise_is_never_infinite() -> None:
    """The highest hash there is comes from token 114156 of this row."""
    uniform = uniform_ref(torch.tensor([-1132602166224107317]), torch.tensor([772658]), 114_157)
    assert int(uniform.argmax()) == 114_156
    assert 0.0 < float(uniform.min()) <= float(uniform.max()) < 1.0


FILTERS = [
    (1.0, 1, 1.0, 0.0),
    (1.0, 20, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (0.7, 20, 0.8, 0.0),
    (1.3, 50, 0.95, 0.02),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 0.0, 0.0),
    (0.0, 5, 0.5, 0.5),
    (1.0, 10**9, 1.0, 0.0),
    (0.05, 3000, 1.0, 0.0),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("spread", [0.01, 2.5])
def test_filters_of_every_kind_in_one_batch(spread: float, seed: int) -> None:
    """A spread of 0.01 keeps thousands of tokens, more than there is room for beside each other."""
    assert_same_tokens(spread * randn(len(FILTERS), 5000, seed=seed), params(FILTERS), seed=seed)


def test_filters_of_a_small_vocabulary_and_of_tied_logits() -> None:
    assert_same_tokens(2 * randn(len(FILTERS), 50, seed=2), params(FILTERS))
    assert_same_tokens((2 * randn(len(FILTERS), 200, seed=3)).round(), params(FILTERS))
    assert_same_tokens(torch.zeros(3, 2100, device=DEVICE), params([FILTERS[i] for i in (1, 2, 6)]))


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = randn(4, 100, seed=4)
    logits[:, 10:] = float("-inf")
    asked = params([FILTERS[i] for i in (1, 2, 4, 5)])
    seeds = torch.arange(4, device=DEVICE)
    assert bool((draw(logits, asked, seeds, seeds)[0] < 10).all())
    assert_same_tokens(logits, asked)


def test_16_bit_logits_are_drawn_as_their_float32_values() -> None:
    assert_same_tokens((3 * randn(3, 6000, seed=5)).half(), params(FILTERS[2:5]))


@pytest.mark.parametrize("mode", SamplingMode)
def test_a_row_with_nan_is_reported_and_spoils_no_other(mode: SamplingMode) -> None:
    logits = randn(3, 5000, seed=6)
    logits[1, 4500] = float("nan")
    asked = params([(0.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.0), (0.0, 0, 1.0, 0.0)])
    seeds = torch.arange(3, device=DEVICE)
    tokens, finite = draw(logits, asked, seeds, seeds, mode)
    assert finite.tolist() == [True, False, True]
    assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(dim=1).tolist()
    assert 0 <= int(tokens[1]) < 5000


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("spread", [0.02, 2.5])
def test_many_rows_of_a_large_vocabulary(spread: float) -> None:
    asked = params(FILTERS * 6)
    # The last bits of a logarithm decide a few draws in a million.
    for seed in range(5):
        assert_same_tokens(spread * randn(60, 128_256, seed=seed), asked, seed=seed)
