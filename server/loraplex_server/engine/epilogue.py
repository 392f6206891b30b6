"""DoRA's factors and trained biases, as one factor and one shift for each output of a group of linears.

With base output ``W x + b0`` and update ``d``, peft computes ``f * (W x + d) + b1``: f is magnitude / |W + scaling * B A|
by rows (1 without DoRA) and b1 the trained bias, or b0, with the second factor's own bias. That is
``f * (W x + b0 + d) + (b1 - f * b0)``, so nothing has to know the base's bias apart.
Source: DoRA, arXiv 2402.09353, its section 4.3: the norm is that of the weights as they are served.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from loraplex_adapters.base import EMBED, HEAD, BaseShape, ModuleKey
from loraplex_adapters.format import AdapterWeights, LoraFactors

# Numbers of a matrix that are in float32 at once.
_CHUNK_ELEMENTS: Final = 8 * 2**20


class BaseWeights(Protocol):
    """The base's own weights, as they are served."""

    def weight_rows(self, module: ModuleKey, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a module's matrix, dense, or of those that follow it in its group. Shape: [rows, K]."""
        ...

    def bias(self, module: ModuleKey) -> Tensor | None:
        """A linear's bias [N]."""
        ...


@dataclass(frozen=True, slots=True)
class Epilogue:
    """Of one group of linears: factor [N], shift [N], float32, on the host."""

    factor: Tensor
    shift: Tensor


class EffectiveWeights:
    """The base's weights with an adapter's whole matrices and trained rows in their places."""

    def __init__(self, base: BaseWeights, weights: AdapterWeights) -> None:
        self._base = base
        self._weights = weights

    def rows(self, module: ModuleKey, start: int, stop: int) -> Tensor:
        """Shape: [rows, K]."""
        whole, tokens = self._weights.whole.get(module), self._weights.rows.get(module)
        rows = self._base.weight_rows(module, start, stop) if whole is None else whole[start:stop]
        if tokens is not None:
            here = [(i, token - start) for i, token in enumerate(tokens.indices) if start <= token < stop]
            if here:
                source, target = (torch.tensor(list(ids)) for ids in zip(*here, strict=True))
                rows = rows.clone()
                rows[target.to(rows.device)] = tokens.values[source].to(rows)
        return rows


def epilogue_of(
    members: Sequence[ModuleKey], sizes: Sequence[int], weights: AdapterWeights, base: BaseWeights
) -> Epilogue:
    """The epilogue of a group of linears (``members``, with ``sizes`` outputs each)."""
    factor, shift = torch.ones(sum(sizes)), torch.zeros(sum(sizes))
    dense: Tensor | None = None
    start = 0
    for module, size in zip(members, sizes, strict=True):
        columns = slice(start, start + size)
        start += size
        lora = weights.factors.get(module)
        if lora is not None and lora.magnitude is not None:
            if module in (EMBED, HEAD):
                norms = _vocabulary_norms(EffectiveWeights(base, weights), module, lora)
            else:
                # All of the group at once: to make one linear dense, its neighbors may have to be made dense with it.
                dense = base.weight_rows(members[0], 0, sum(sizes)) if dense is None else dense
                norms = _norms(dense[columns], lora)
            factor[columns] = lora.magnitude.float() / norms
        stored = base.bias(module)
        old = torch.zeros(size) if stored is None else stored.float().cpu()
        new = weights.biases[module].float() if module in weights.biases else old
        if lora is not None and lora.b_bias is not None:
            new = new + lora.scaling * lora.b_bias.float()
        shift[columns] = new - factor[columns] * old
    return Epilogue(factor, shift)


def epilogue_groups(
    weights: AdapterWeights, base: BaseShape, groups: Mapping[str, tuple[str, ...]]
) -> frozenset[tuple[int, str]]:
    """The groups of the layers in which anything is DoRA or has a bias of its own."""
    modules = {module for module, lora in weights.factors.items() if not lora.is_plain} | set(weights.biases)
    return frozenset(
        (layer, group)
        for layer in range(base.num_layers)
        for group, members in groups.items()
        if any((layer, member) in modules for member in members)
    )


@torch.inference_mode()
def _norms(dense: Tensor, lora: LoraFactors) -> Tensor:
    """|W + scaling * B A| by rows, from W [N, K]: [N], float32 on the host."""
    n, k = dense.shape
    rows, found = max(1, _CHUNK_ELEMENTS // k), []
    a = lora.a.to(dense.device).float()
    for start in range(0, n, rows):
        b = lora.b[start : start + rows].to(dense.device).float()
        update = (b @ a).mul_(lora.scaling)
        found.append(torch.linalg.vector_norm(update.add_(dense[start : start + rows].float()), dim=1).cpu())
    return torch.cat(found)


@torch.inference_mode()
def _vocabulary_norms(weights: EffectiveWeights, module: ModuleKey, lora: LoraFactors) -> Tensor:
    """The same of the head, or of the embeddings: these are kept [V, H], but LoRA sees their transpose, so that there is a
    norm for each of H over all tokens."""
    n = lora.b.shape[0]
    if module == HEAD:
        return _norms(weights.rows(module, 0, n), lora)
    num_tokens, squares = lora.a.shape[1], torch.zeros(n)
    rows = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, num_tokens, rows):
        own = weights.rows(module, start, min(start + rows, num_tokens)).float()
        b, a = lora.b.to(own.device).float(), lora.a[:, start : start + rows].to(own.device).float()
        squares += (own + lora.scaling * (b @ a).t()).square().sum(0).cpu()
    return squares.sqrt()
