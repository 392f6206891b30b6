"""New adapters out of several: exact by concatenation, or approximate (SVD, TIES, DARE, magnitude pruning).

All methods work on the update that an adapter really makes, ``weight * scaling * B @ A``, never on A and B apart: the
mean of two A times the mean of two B is another update, not the mean of both.

Sources: TIES-Merging (arXiv 2306.01708), DARE (arXiv 2311.03099).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from loraplex_adapters.base import ModuleKey, module_path
from loraplex_adapters.errors import InvalidAdapter
from loraplex_adapters.weights import AdapterWeights, LoraFactors

MAX_PARTS = 64
# Beyond the wanted rank, and passes over the matrix, of the randomized SVD that approximates a dense update.
_OVERSAMPLING = 16
_POWER_PASSES = 3


class CombineMethod(StrEnum):
    """How updates become one. ``concat`` is exact; the others are approximate and report by how much."""

    CONCAT = "concat"
    SVD = "svd"
    TIES = "ties"
    DARE = "dare"
    MAGNITUDE_PRUNE = "magnitude-prune"


@dataclass(frozen=True)
class Part:
    """One adapter of a combination and the factor of its update (negative ones take it away)."""

    weights: AdapterWeights
    weight: float


@dataclass(frozen=True)
class ModuleError:
    """How far a module's new update is from the exact sum of the parts' updates, in Frobenius norms.

    ``error`` is |new - sum| / |sum|; ``discarded`` is what cutting the method's own result down to the new rank lost,
    relative to that result. Both are 0 where the norm they divide by is.
    """

    rank: int
    error: float
    discarded: float


@dataclass(frozen=True)
class Combination:
    """The new adapter, and the error of each of its modules."""

    weights: AdapterWeights
    errors: Mapping[ModuleKey, ModuleError]

    @property
    def error(self) -> float:
        """The largest relative error of a module."""
        return max(error.error for error in self.errors.values())


def combine(
    parts: Sequence[Part],
    method: CombineMethod = CombineMethod.CONCAT,
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    on_module: Callable[[ModuleKey, int, int], None] | None = None,
) -> Combination:
    """Combine the parts' updates into one adapter.

    ``rank``: the new rank of each module (the largest among its parts if None; at most what the module allows);
    ``concat`` takes none, its ranks add up. ``density``: the share of entries that TIES, DARE and magnitude pruning
    keep. ``seed``: of DARE's choice and of the randomized SVD. ``dtype``: of the new factors.
    ``on_module(module, done, total)`` is called after each module.

    Raises: InvalidAdapter for arguments out of range, weights that are no numbers, and parts that differ in shape.
    """
    _check(parts, method, rank, density)
    modules = sorted({module for part in parts for module in part.weights.factors})
    factors, errors = {}, {}
    generator = torch.Generator().manual_seed(seed)
    for done, module in enumerate(modules, start=1):
        present = [(part.weights.factors[module], part.weight) for part in parts if module in part.weights.factors]
        exact = _concatenated(module, present)
        if method is CombineMethod.CONCAT:
            made = LoraFactors(exact.a.to(dtype), exact.b.to(dtype), 1.0)
            discarded = 0.0
        else:
            wanted = rank or max(lora.rank for lora, _ in present)
            made, discarded = _approximate(module, present, exact, method, wanted, density, generator, dtype)
        factors[module] = made
        errors[module] = ModuleError(made.rank, _distance(made, exact), discarded)
        if on_module is not None:
            on_module(module, done, len(modules))
    return Combination(AdapterWeights(factors), errors)


def _check(parts: Sequence[Part], method: CombineMethod, rank: int | None, density: float) -> None:
    if not 1 <= len(parts) <= MAX_PARTS:
        raise InvalidAdapter(f"A combination takes 1 to {MAX_PARTS} adapters, not {len(parts)}.", code="combine_parts")
    if any(not abs(part.weight) <= 1e6 for part in parts):  # also NaN
        raise InvalidAdapter("Weights of a combination must be numbers between -1e6 and 1e6.", code="combine_weight")
    if not all(part.weights.is_plain for part in parts):
        raise InvalidAdapter(
            "An adapter with DoRA, trained biases, tokens or whole modules, or LoRA on embeddings or head, is no sum of "
            "low-rank updates and cannot be combined.",
            code="combine_beyond_lora",
        )
    if not all(part.weights.is_plain for part in parts):
        raise InvalidAdapter(
            "Only low-rank updates of the layers' linears add up. One of these adapters also scales outputs (DoRA) or "
            "holds biases, tokens or whole matrices: serve it alone.",
            code="combine_not_plain",
        )
    if method is CombineMethod.CONCAT and rank is not None:
        raise InvalidAdapter(
            "concat keeps every rank, which is what makes it exact; use svd for a chosen rank.", code="combine_rank"
        )
    if rank is not None and rank < 1:
        raise InvalidAdapter(f"The new rank must be at least 1, not {rank}.", code="combine_rank")
    if not 0 < density <= 1:
        raise InvalidAdapter(f"density must be above 0 and at most 1, not {density}.", code="combine_density")


def _concatenated(module: ModuleKey, present: Sequence[tuple[LoraFactors, float]]) -> LoraFactors:
    """The exact sum of the updates in float32: a [sum R, K], b [N, sum R], scaling 1."""
    shapes = {(lora.b.shape[0], lora.a.shape[1]) for lora, _ in present}
    if len(shapes) > 1:
        raise InvalidAdapter(
            f"The adapters' {module_path(*module)} differ in shape ({', '.join(f'{n} x {k}' for n, k in sorted(shapes))}): "
            "they were made for different bases.",
            code="combine_shapes",
        )
    a = torch.cat([lora.a.float() for lora, _ in present])
    b = torch.cat([lora.b.float() * (weight * lora.scaling) for lora, weight in present], dim=1)
    return LoraFactors(a, b, 1.0)


def _approximate(
    module: ModuleKey,
    present: Sequence[tuple[LoraFactors, float]],
    exact: LoraFactors,
    method: CombineMethod,
    wanted: int,
    density: float,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> tuple[LoraFactors, float]:
    """Factors of at most ``wanted`` ranks, and the relative norm that the cut to that rank discarded."""
    rank = min(wanted, *exact.a.shape[1:], exact.b.shape[0])
    if method is CombineMethod.SVD:
        u, s, vh = _factored_svd(exact)
        norm = float(s.square().sum().sqrt())
        left = float(s[rank:].square().sum().sqrt())
    else:
        deltas = [
            _dense(LoraFactors(lora.a.float(), lora.b.float(), lora.scaling * weight)) for lora, weight in present
        ]
        if method is CombineMethod.TIES:
            merged = _ties(deltas, density)
        elif method is CombineMethod.DARE:
            merged = _sum(_dropped(delta, density, generator) for delta in deltas)
        else:
            merged = _sum(_trimmed(delta, density) for delta in deltas)
        u, s, vh = _randomized_svd(merged, rank, generator)
        norm = float(torch.linalg.vector_norm(merged))
        left = max(norm**2 - float(s[:rank].square().sum()), 0.0) ** 0.5
    root = s[:rank].sqrt()
    made = LoraFactors((root[:, None] * vh[:rank]).to(dtype), (u[:, :rank] * root).to(dtype), 1.0)
    return made, left / norm if norm else 0.0


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    """The sum of one tensor or more, one of them in memory beside it at a time."""
    total = next(tensors)
    for tensor in tensors:
        total += tensor
    return total


def _dense(lora: LoraFactors) -> Tensor:
    return (lora.b @ lora.a).mul_(lora.scaling)


def _factored_svd(lora: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """The exact SVD of b @ a through the QR of both factors: the dense [N, K] is never made."""
    q_b, r_b = torch.linalg.qr(lora.b.double())
    q_a, r_a = torch.linalg.qr(lora.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def _randomized_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular triples of a dense matrix (Halko et al., arXiv 0909.4061)."""
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator)
    for _ in range(_POWER_PASSES):
        basis, _ = torch.linalg.qr(basis)
        other, _ = torch.linalg.qr(matrix.T @ basis)
        basis = matrix @ other
    basis, _ = torch.linalg.qr(basis)
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """Only the ``density`` largest entries by magnitude."""
    keep = max(1, round(density * delta.numel()))
    if keep == delta.numel():
        return delta
    threshold = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def _dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries kept at random with probability ``density`` and scaled up, so that the expectation stays."""
    kept = torch.empty_like(delta).bernoulli_(density, generator=generator)
    return delta * kept / density


def _ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect each entry's sign by mass, and add up the entries that have it.

    A sum where the paper takes a mean: parts that never conflict then combine to their exact sum, as with the other
    methods, and the parts' weights say how strong each is.
    """
    trimmed = torch.stack([_trimmed(delta, density) for delta in deltas])
    elected = trimmed.sum(0).sign()
    return torch.where(trimmed.sign() == elected, trimmed, 0.0).sum(0)


def _distance(made: LoraFactors, exact: LoraFactors) -> float:
    """|made - exact| / |exact| without a dense matrix: both are low-rank, so is their difference."""
    norm = _norm(exact.a.double(), exact.b.double())
    a = torch.cat([made.a.double(), exact.a.double()])
    b = torch.cat([made.b.double() * made.scaling, -exact.b.double()], dim=1)
    return _norm(a, b) / norm if norm else 0.0


def _norm(a: Tensor, b: Tensor) -> float:
    """|b @ a| by the triangles of both factors' QR, which loses no digits to cancellation as the Gram form would."""
    r_b = torch.linalg.qr(b, mode="r").R
    r_a = torch.linalg.qr(a.T, mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))
