"""Folds an adapter's update into the dense weights of its base."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_adapters.base import ModuleKey, module_path
from loraplex_adapters.combine import Part
from loraplex_adapters.errors import InvalidAdapter, WrongBase
from loraplex_adapters.weights import LoraFactors


def check_foldable(parts: Sequence[Part]) -> None:
    """Raise InvalidAdapter unless the parts' updates can be folded into the linears' weights.

    Foldable are low-rank updates, as many as there are, and one DoRA adapter of weight 1 alone.
    """
    for part in parts:
        weights = part.weights
        linears_only = all(layer >= 0 for layer, _ in weights.factors)
        has_bias = bool(weights.biases) or any(lora.b_bias is not None for lora in weights.factors.values())
        if weights.whole or weights.rows or has_bias or not linears_only:
            raise InvalidAdapter(
                "The adapter holds biases, tokens, embeddings or whole matrices beside its low-rank updates; only updates of "
                "the layers' linears are folded.",
                code="fold_unsupported",
            )
        alone = len(parts) == 1 and part.weight == 1
        if not alone and any(lora.magnitude is not None for lora in weights.factors.values()):
            raise InvalidAdapter(
                "DoRA scales the sum of base and update, so it can neither be weighted nor mixed; fold it alone.",
                code="fold_dora_mixed",
            )


def fold(module: ModuleKey, weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """``weight`` with the parts' weighted updates of ``module`` folded in; ``weight`` itself where none touches it.

    Shapes: weight float32 [N, K]. The products are made in float32, and ``weight`` is not written to.
    Raises: WrongBase if a part's shapes differ. The parts must have passed ``check_foldable``.
    """
    present = [(part.weights.factors[module], part.weight) for part in parts if module in part.weights.factors]
    for lora, _ in present:
        if (lora.b.shape[0], lora.a.shape[1]) != tuple(weight.shape):
            raise WrongBase(
                f"The adapter's {module_path(*module)} is {lora.b.shape[0]} x {lora.a.shape[1]}, the base's is "
                f"{weight.shape[0]} x {weight.shape[1]}: it was made for another base.",
                code="shape_mismatch",
            )
    if not present:
        return weight
    a = torch.cat([lora.a.to(weight.device, torch.float32) for lora, _ in present])
    b = torch.cat([lora.b.to(weight.device, torch.float32) * (scale * lora.scaling) for lora, scale in present], dim=1)
    return _scaled(torch.addmm(weight, b, a), present[0][0])


def _scaled(total: Tensor, lora: LoraFactors) -> Tensor:
    """Rows scaled to DoRA's magnitudes (arXiv 2402.09353), if the adapter has them."""
    if lora.magnitude is None:
        return total
    norms: Tensor = torch.linalg.vector_norm(total, dim=1)
    return total * (lora.magnitude.to(total.device, torch.float32) / norms).unsqueeze(1)
