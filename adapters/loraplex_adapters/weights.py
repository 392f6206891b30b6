"""What an adapter is, as values: low-rank updates, and whatever was trained beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from loraplex_adapters.base import EMBED, HEAD, BaseShape, ModuleKey, fused_parts


@dataclass(frozen=True)
class LoraFactors:
    """One linear's low-rank update: ``y = factor * (W x + scaling * b (a x)) + bias + scaling * b_bias``.

    Shapes: a [R, K], b [N, R]. ``scaling`` is alpha / R, or alpha / sqrt(R) for rsLoRA, and not folded into b.
    ``magnitude`` [N] is DoRA's: ``factor`` is magnitude / |W + scaling * b @ a| by rows, and 1 without it.
    ``b_bias`` [N] is the second factor's own bias. For embeddings K is the vocabulary and x one-hot.
    Source of DoRA: arXiv 2402.09353.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    b_bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether the update is ``scaling * b @ a`` and nothing else."""
        return self.magnitude is None and self.b_bias is None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.a, self.b, self.magnitude, self.b_bias) if tensor is not None]

    def rows(self, start: int, stop: int) -> "LoraFactors":
        """The update of these output rows alone."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        b_bias = None if self.b_bias is None else self.b_bias[start:stop]
        return LoraFactors(self.a, self.b[start:stop], self.scaling, magnitude, b_bias)


@dataclass(frozen=True)
class TokenRows:
    """Rows of a vocabulary matrix in place of the base's. Shapes: indices n, values [n, H]."""

    indices: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """Everything one adapter changes. Tensors read from a file are memory-mapped and must not be written to.

    ``biases``: trained biases of linears [N], in place of the base's. ``whole``: trained weights of norms, and of the
    embeddings and the head [V', H], which may have more rows or fewer than the base. ``rows``: single rows of these two.
    ``ties_whole``, ``ties_lora``: where the base ties its head to its embeddings, the embeddings' whole matrix, or their LoRA,
    is the head's too.
    """

    factors: Mapping[ModuleKey, LoraFactors]
    biases: Mapping[ModuleKey, Tensor] = field(default_factory=dict)
    whole: Mapping[ModuleKey, Tensor] = field(default_factory=dict)
    rows: Mapping[ModuleKey, TokenRows] = field(default_factory=dict)
    ties_whole: bool = False
    ties_lora: bool = False

    @property
    def ranks(self) -> dict[ModuleKey, int]:
        """Each module's true rank."""
        return {module: factors.rank for module, factors in self.factors.items()}

    @property
    def max_rank(self) -> int:
        return max((factors.rank for factors in self.factors.values()), default=0)

    @property
    def is_plain(self) -> bool:
        """Whether it is low-rank updates of the layers' linears and nothing else, as mixing and folding need."""
        others = self.biases or self.whole or self.rows
        return not others and all(lora.is_plain and layer >= 0 for (layer, _), lora in self.factors.items())

    def tensors(self) -> list[tuple[str, ModuleKey, Tensor]]:
        """Every tensor with what it is and its module."""
        found = [("LoRA", module, tensor) for module, lora in self.factors.items() for tensor in lora.tensors()]
        found += [("bias", module, tensor) for module, tensor in self.biases.items()]
        found += [("weight", module, tensor) for module, tensor in self.whole.items()]
        return found + [("trained rows", module, rows.values) for module, rows in self.rows.items()]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for _, _, tensor in self.tensors())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, _, tensor in self.tensors())

    def for_base(self, base: BaseShape) -> "AdapterWeights":
        """The same by the base's own modules: stacked linears parted, and the head given what it shares."""
        return _tied(_parted(self, base), base)


def _parted(weights: AdapterWeights, base: BaseShape) -> AdapterWeights:
    """Stacked linears as their parts: each has its own rows of B, and the same A."""
    factors: dict[ModuleKey, LoraFactors] = {}
    for module, lora in weights.factors.items():
        parts = fused_parts(module, base)
        factors |= {part: lora.rows(start, stop) for part, start, stop in parts} if parts else {module: lora}
    biases: dict[ModuleKey, Tensor] = {}
    for module, bias in weights.biases.items():
        parts = fused_parts(module, base)
        biases |= {part: bias[start:stop] for part, start, stop in parts} if parts else {module: bias}
    return replace(weights, factors=factors, biases=biases)


def _tied(weights: AdapterWeights, base: BaseShape) -> AdapterWeights:
    """As peft ties: trained rows always, whole matrices and LoRA where the config asks for it."""
    if not base.tied_embeddings:
        return weights
    factors, whole, rows = dict(weights.factors), dict(weights.whole), dict(weights.rows)
    if EMBED in rows:
        rows.setdefault(HEAD, rows[EMBED])
    if weights.ties_whole and EMBED in whole:
        whole.setdefault(HEAD, whole[EMBED])
    if weights.ties_lora and EMBED in factors:
        lora = factors[EMBED]
        factors.setdefault(HEAD, LoraFactors(lora.b.T, lora.a.T, lora.scaling))
    return replace(weights, factors=factors, whole=whole, rows=rows)
