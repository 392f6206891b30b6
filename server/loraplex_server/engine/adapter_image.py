"""An adapter as one flat run of numbers, laid out the way the kernels read it.

For every layer and fused group the image holds the stacked A rows ``[R_group, K]`` and then each part's B: row-major
``[N_part, R_part]`` for the GPU's kernels, ``[R_part, N_part]`` (``rank_major``) for a CPU, whose matrix products of a
few rows take a third of the time that way. alpha / r (or alpha / sqrt(r)) is folded into B once, in float32, and each part's
rank is padded with zeros to a multiple of 8, so that rows stay 16-byte aligned at 16-bit precision. Memory and time
follow the true ranks of each module; there is no ceiling to choose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_adapters.format import AdapterWeights
from loraplex_server.kernels.lora_ref import GroupDelta, PartDelta
from loraplex_server.model.adapters import GROUPS

RANK_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class PartPlace:
    """One linear's B inside an image: offset in elements, its columns in the group's output, its padded rank."""

    offset: int
    col_start: int
    col_stop: int
    rank_start: int
    rank: int


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """One group's factors inside an image: A is [rank, k] at ``offset``."""

    offset: int
    rank: int
    k: int
    parts: tuple[PartPlace, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AdapterLayout:
    """Where everything lies in an adapter's image. ``num_elements`` is the image's length; ``padded`` if some rank is.

    Shared by adapters that are alike, and compared by identity.
    """

    groups: Mapping[tuple[int, str], GroupPlace]
    num_elements: int
    rank_major: bool
    padded: bool

    def delta(self, image: Tensor, key: tuple[int, str]) -> GroupDelta | None:
        """One group's factors as views into ``image`` [num_elements]; None where the adapter changes nothing."""
        place = self.groups.get(key)
        if place is None:
            return None
        a = image.as_strided((place.rank, place.k), (place.k, 1), image.storage_offset() + place.offset)
        parts = []
        for part in place.parts:
            n = part.col_stop - part.col_start
            strides = (1, n) if self.rank_major else (part.rank, 1)
            b = image.as_strided((n, part.rank), strides, image.storage_offset() + part.offset)
            parts.append(PartDelta(part.col_start, part.col_stop, part.rank_start, part.rank_start + part.rank, b))
        return GroupDelta(a, tuple(parts))

    def deltas(self, image: Tensor) -> dict[tuple[int, str], GroupDelta]:
        """All groups' factors."""
        return {key: delta for key in self.groups if (delta := self.delta(image, key)) is not None}


@dataclass(frozen=True, slots=True)
class Rescale:
    """Runs of an image that are still to be multiplied by a scaling: ``count`` runs of ``size``, ``stride`` apart."""

    offset: int
    size: int
    stride: int
    count: int
    scaling: float

    def apply(self, image: Tensor) -> None:
        runs = image.as_strided((self.count, self.size), (self.stride, 1), image.storage_offset() + self.offset)
        runs.mul_(self.scaling)


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter in host memory, ready to be copied to the device in one piece.

    ``rescales``: what the device multiplies once the image is there, which is free for it; in float32 and rounded once,
    so the outcome is the same as if it had been folded in here.
    """

    data: Tensor
    layout: AdapterLayout
    rescales: Sequence[Rescale] = ()

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def plan_layout(ranks: Mapping[tuple[int, str], int], base: BaseShape, *, rank_major: bool) -> AdapterLayout:
    """Lay out an adapter whose modules have these true ranks."""
    groups: dict[tuple[int, str], GroupPlace] = {}
    padded = any(rank % RANK_ALIGNMENT for rank in ranks.values())
    end = 0
    for layer in range(base.num_layers):
        for group, members in GROUPS.items():
            present = {
                m: -(-ranks[layer, m] // RANK_ALIGNMENT) * RANK_ALIGNMENT for m in members if (layer, m) in ranks
            }
            if not present:
                continue
            k = base.linears[members[0]][1]
            total = sum(present.values())
            start = end
            end += total * k
            parts = []
            column = rank_start = 0
            for member in members:
                n = base.linears[member][0]
                if member in present:
                    rank = present[member]
                    parts.append(PartPlace(end, column, column + n, rank_start, rank))
                    rank_start += rank
                    end += n * rank
                column += n
            groups[layer, group] = GroupPlace(start, total, k, tuple(parts))
    return AdapterLayout(groups, end, rank_major, padded)


def build_image(
    weights: AdapterWeights, base: BaseShape, dtype: torch.dtype, *, pinned: bool, rank_major: bool = False
) -> AdapterImage:
    """Pack an adapter's factors into a fresh host image (page-locked if ``pinned``)."""
    layout = plan_layout(weights.ranks, base, rank_major=rank_major)
    data = torch.empty(layout.num_elements, dtype=dtype, pin_memory=pinned)
    fill_image(data, weights, layout)
    return AdapterImage(data, layout)


def fill_image(data: Tensor, weights: AdapterWeights, layout: AdapterLayout) -> None:
    """Write an adapter's factors into ``data`` [num_elements], scaling included."""
    if layout.padded:
        data.zero_()
    for (layer, group), delta in layout.deltas(data).items():
        members = [m for m in GROUPS[group] if (layer, m) in weights.factors]
        for member, part in zip(members, delta.parts, strict=True):
            factors = weights.factors[layer, member]
            rank = factors.a.shape[0]
            delta.a[part.rank_start : part.rank_start + rank].copy_(factors.a)
            part.b[:, :rank].copy_(factors.b.float() * factors.scaling)
