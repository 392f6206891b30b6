"""What an adapter's image holds of modules outside the layers' linears: norms, and rows of embeddings and head.

Of embeddings and head only the rows that differ from the base's are kept: tokens trained alone, rows that were added,
and of a matrix that was trained or saved whole those that the training touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from loraplex_adapters.base import EMBED, HEAD, BaseShape, ModuleKey
from loraplex_adapters.format import AdapterWeights
from loraplex_server.engine.epilogue import BaseWeights
from loraplex_server.kernels.lora_ref import GroupDelta
from loraplex_server.model.adapters import OutsideParts, VocabularyRows

_ALIGNMENT: Final = 8
_COMPARED_ROWS: Final = 4096


def float32_elements(count: int, itemsize: int) -> int:
    """Elements of an image that ``count`` numbers of 4 bytes take, with what keeps the next ones aligned."""
    return _aligned(-(-count * 4 // itemsize))


def float32_at(image: Tensor, offset: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``count`` numbers of 4 bytes at ``offset`` elements of ``image``, as a view."""
    size = count * 4 // image.element_size()
    return image.as_strided((size,), (1,), image.storage_offset() + offset).view(dtype)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class RowsPlace:
    """Rows of a vocabulary matrix: which tokens, rows in all, and where indices and values begin in the image."""

    tokens: Tensor
    size: int
    hidden: int
    offset: int = 0
    values: int = 0

    def at(self, offset: int, itemsize: int) -> "RowsPlace":
        return replace(self, offset=offset, values=offset + float32_elements(len(self.tokens), itemsize))

    @property
    def end(self) -> int:
        return _aligned(self.values + len(self.tokens) * self.hidden)

    def rows(self, image: Tensor) -> VocabularyRows:
        """As views into ``image``."""
        count = len(self.tokens)
        indices = float32_at(image, self.offset, count, torch.int32)
        start = image.storage_offset() + self.values
        return VocabularyRows(indices, image.as_strided((count, self.hidden), (self.hidden, 1), start), self.size)


@dataclass(frozen=True, slots=True)
class OutsidePlace:
    """Where all of it lies. ``norms``: by module, elements and offset."""

    norms: Mapping[ModuleKey, tuple[int, int]]
    matrices: Mapping[ModuleKey, RowsPlace]
    vocab_size: int
    end: int = field(default=0)

    def at(self, start: int, itemsize: int) -> "OutsidePlace":
        """The same from ``start`` on."""
        norms, matrices = {}, {}
        for module, (size, _) in self.norms.items():
            norms[module] = (size, start)
            start += _aligned(size)
        for module, rows in self.matrices.items():
            matrices[module] = rows.at(start, itemsize)
            start = matrices[module].end
        return OutsidePlace(norms, matrices, self.vocab_size, start)

    def fill(self, image: Tensor, weights: AdapterWeights) -> None:
        """Write norms and rows into ``image``."""
        for module, (size, offset) in self.norms.items():
            image[offset : offset + size].copy_(weights.whole[module])
        for module, place in self.matrices.items():
            rows = place.rows(image)
            rows.indices.copy_(place.tokens)
            whole, tokens = weights.whole.get(module), weights.rows.get(module)
            if whole is not None:
                rows.values.copy_(whole[place.tokens.clamp(max=whole.shape[0] - 1).long()])
            if tokens is not None:
                at = torch.searchsorted(place.tokens, torch.tensor(tokens.indices, dtype=torch.int32))
                rows.values[at] = tokens.values.to(rows.values.dtype)

    def parts(self, image: Tensor, embed_lora: GroupDelta | None, head_lora: GroupDelta | None) -> OutsideParts:
        """All of it as views into ``image``."""
        norms = {module: image[offset : offset + size] for module, (size, offset) in self.norms.items()}
        found = {module: place.rows(image) for module, place in self.matrices.items()}
        return OutsideParts(norms, found.get(EMBED), embed_lora, found.get(HEAD), head_lora, self.vocab_size)


def plan_outside(
    weights: AdapterWeights, shape: BaseShape, base: BaseWeights, dtype: torch.dtype
) -> tuple[OutsidePlace | None, tuple[int, int]]:
    """What must be kept of ``weights``, not yet placed (None for nothing), and the adapter's rows of embeddings and head."""
    norms = {m: (w.shape[0], 0) for m, w in weights.whole.items() if m not in (EMBED, HEAD)}
    sizes = {m: weights.whole[m].shape[0] if m in weights.whole else shape.vocab_size for m in (EMBED, HEAD)}
    matrices = {}
    for module in (EMBED, HEAD):
        tokens = _changed_tokens(module, weights, shape, base, dtype)
        if len(tokens):
            matrices[module] = RowsPlace(tokens, sizes[module], shape.hidden_size)
    changed = bool(norms or matrices) or sizes[HEAD] != shape.vocab_size
    if not changed and not any(layer < 0 for layer, _ in weights.factors):
        return None, (sizes[EMBED], sizes[HEAD])
    return OutsidePlace(norms, matrices, sizes[HEAD]), (sizes[EMBED], sizes[HEAD])


def _changed_tokens(
    module: ModuleKey, weights: AdapterWeights, shape: BaseShape, base: BaseWeights, dtype: torch.dtype
) -> Tensor:
    """The tokens whose row is not the base's, ascending: [n] int32."""
    found: set[int] = set()
    whole = weights.whole.get(module)
    if whole is not None:
        shared = min(whole.shape[0], shape.vocab_size)
        for start in range(0, shared, _COMPARED_ROWS):
            stop = min(start + _COMPARED_ROWS, shared)
            theirs = base.weight_rows(module, start, stop).cpu()
            differs = (whole[start:stop].to(dtype) != theirs.to(dtype)).any(dim=1)
            found |= {start + int(i) for i in differs.nonzero()[:, 0]}
        found |= set(range(shared, whole.shape[0]))
    if module in weights.rows:
        found |= set(weights.rows[module].indices)
    return torch.tensor(sorted(found), dtype=torch.int32)
