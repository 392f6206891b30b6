"""Combinations of adapters against dense arithmetic."""

import math

import pytest
import torch
from torch import Tensor

from loraplex_adapters.base import ModuleKey
from loraplex_adapters.combine import CombineMethod, Part, combine
from loraplex_adapters.errors import InvalidAdapter
from loraplex_adapters.format import AdapterWeights, LoraFactors

MODULE: ModuleKey = (0, "q_proj")
OTHER: ModuleKey = (1, "up_proj")
N, K = 24, 20


def lora(seed: int, rank: int, scaling: float = 0.5, n: int = N, k: int = K) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator), scaling)


def part(seed: int, rank: int, weight: float = 1.0, module: ModuleKey = MODULE) -> Part:
    return Part(AdapterWeights({module: lora(seed, rank)}), weight)


def delta(weights: AdapterWeights, module: ModuleKey = MODULE) -> Tensor:
    factors = weights.factors[module]
    return factors.scaling * factors.b.double() @ factors.a.double()


def weighted_sum(parts: list[Part]) -> Tensor:
    return sum((p.weight * delta(p.weights) for p in parts), torch.zeros(N, K, dtype=torch.float64))


def test_concatenation_is_the_exact_weighted_sum() -> None:
    parts = [part(0, 4, 0.7), part(1, 8, -1.5), part(2, 1, 0.0)]
    made = combine(parts)
    torch.testing.assert_close(delta(made.weights), weighted_sum(parts), rtol=1e-5, atol=1e-5)
    assert made.weights.ranks == {MODULE: 13}
    assert made.error < 1e-6


def test_modules_that_only_one_part_has_are_kept() -> None:
    made = combine([part(0, 2), part(1, 3, 2.0, OTHER)], CombineMethod.SVD)
    assert made.weights.ranks == {MODULE: 2, OTHER: 3}
    torch.testing.assert_close(delta(made.weights, OTHER), 2.0 * delta(part(1, 3).weights), rtol=1e-5, atol=1e-5)


def test_svd_is_the_best_approximation_of_its_rank() -> None:
    parts = [part(0, 6), part(1, 6, -0.5)]
    made = combine(parts, CombineMethod.SVD, rank=5)
    exact = weighted_sum(parts)
    singular = torch.linalg.svdvals(exact)
    best = float(singular[5:].square().sum().sqrt() / torch.linalg.matrix_norm(exact))
    assert made.errors[MODULE].rank == 5
    assert made.error == pytest.approx(best, rel=1e-4)
    assert made.errors[MODULE].discarded == pytest.approx(best, rel=1e-4)
    assert float(
        torch.linalg.matrix_norm(delta(made.weights) - exact) / torch.linalg.matrix_norm(exact)
    ) == pytest.approx(best, rel=1e-4)


def test_the_sum_of_one_adapter_and_its_negative_is_nothing() -> None:
    made = combine([part(3, 4), part(3, 4, -1.0)], CombineMethod.SVD)
    assert float(delta(made.weights).abs().max()) < 1e-5


@pytest.mark.parametrize("method", [CombineMethod.TIES, CombineMethod.DARE, CombineMethod.MAGNITUDE_PRUNE])
def test_keeping_everything_of_one_adapter_gives_it_back(method: CombineMethod) -> None:
    made = combine([part(0, 4)], method, density=1.0)
    assert made.error < 1e-5


def test_ties_trims_elects_and_adds_what_agrees() -> None:
    parts = [part(0, 4), part(1, 4), part(2, 4, 0.3)]
    trimmed = []
    for p in parts:
        dense = p.weight * delta(p.weights)
        largest = dense.abs().flatten().sort(descending=True).values[: round(0.4 * N * K)].min()
        trimmed.append(torch.where(dense.abs() >= largest, dense, 0.0))
    stacked = torch.stack(trimmed)
    agrees = stacked.sign() == stacked.sum(0).sign()
    expected = (stacked * agrees).sum(0)
    made = combine(parts, CombineMethod.TIES, rank=min(N, K), density=0.4)
    torch.testing.assert_close(delta(made.weights), expected, rtol=1e-4, atol=1e-4)
    assert made.errors[MODULE].discarded < 1e-3
    assert made.error > 0.1  # conflicting entries are gone, and the report says so


def test_dare_keeps_the_expectation_and_follows_its_seed() -> None:
    parts = [part(0, 4)]
    runs = [combine(parts, CombineMethod.DARE, rank=K, density=0.5, seed=seed) for seed in range(200)]
    mean = torch.stack([delta(run.weights) for run in runs]).mean(0)
    exact = weighted_sum(parts)
    assert float(torch.linalg.matrix_norm(mean - exact) / torch.linalg.matrix_norm(exact)) < 3 / math.sqrt(len(runs))
    again = combine(parts, CombineMethod.DARE, rank=K, density=0.5, seed=7)
    assert torch.equal(delta(again.weights), delta(runs[7].weights))
    assert not torch.equal(delta(runs[6].weights), delta(runs[7].weights))
    dropped = (delta(runs[0].weights).abs() < 1e-4).double().mean()
    assert 0.4 < float(dropped) < 0.6


def test_magnitude_pruning_keeps_the_largest_entries() -> None:
    parts = [part(0, 4)]
    made = combine(parts, CombineMethod.MAGNITUDE_PRUNE, rank=K, density=0.25)
    dense = weighted_sum(parts)
    kept = delta(made.weights).abs() > 1e-4
    assert int(kept.sum()) == round(0.25 * N * K)
    assert float(dense.abs()[kept].min()) >= float(dense.abs()[~kept].max())


def test_errors_of_large_ranks_do_not_hide_in_cancellation() -> None:
    exact = combine([part(0, 16)], CombineMethod.SVD, rank=16)
    assert exact.error < 1e-6


@pytest.mark.parametrize(
    ("parts", "options", "code"),
    [
        ([], {}, "combine_parts"),
        ([part(0, 2)] * 65, {}, "combine_parts"),
        ([part(0, 2, math.nan)], {}, "combine_weight"),
        ([part(0, 2, math.inf)], {}, "combine_weight"),
        ([part(0, 2)], {"rank": 4}, "combine_rank"),
        ([part(0, 2)], {"method": CombineMethod.SVD, "rank": 0}, "combine_rank"),
        ([part(0, 2)], {"method": CombineMethod.TIES, "density": 0.0}, "combine_density"),
        ([part(0, 2)], {"method": CombineMethod.TIES, "density": 1.5}, "combine_density"),
        ([part(0, 2), Part(AdapterWeights({MODULE: lora(1, 2, n=N + 1)}), 1.0)], {}, "combine_shapes"),
    ],
)
def test_impossible_combinations_are_refused(parts: list[Part], options: dict[str, object], code: str) -> None:
    with pytest.raises(InvalidAdapter) as refused:
        combine(parts, **options)  # type: ignore[arg-type]
    assert refused.value.code == code
