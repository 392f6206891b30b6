"""An adapter as one flat run of numbers, laid out the way the kernels read it.

For every layer and fused group the image holds the stacked A rows ``[R_group, K]`` and then each part's B: row-major
``[N_part, R_part]`` for the GPU's kernels, ``[R_part, N_part]`` (``rank_major``) for a CPU, whose matrix products of a
few rows take a third of the time that way. alpha / r (or alpha / sqrt(r)) is folded into B once, in float32, and each part's
rank is padded with zeros to a multiple of 8, so that rows stay 16-byte aligned at 16-bit precision. Memory and time
follow the true ranks of each module; there is no ceiling to choose.
"""

from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where everything lies in an adapter's image. ``num_elements`` is the image's length."""

    groups: Mapping[tuple[int, str], GroupPlace]
    num_elements: int
    rank_major: bool

    def deltas(self, image: Tensor) -> dict[tuple[int, str], GroupDelta]:
        """Views into ``image`` [num_elements] as the kernels' values."""
        return {key: self._delta(image, place) for key, place in self.groups.items()}

    def _delta(self, image: Tensor, place: GroupPlace) -> GroupDelta:
        a = image[place.offset : place.offset + place.rank * place.k].view(place.rank, place.k)
        parts = []
        for part in place.parts:
            n = part.col_stop - part.col_start
            b = image[part.offset : part.offset + n * part.rank]
            b = b.view(part.rank, n).t() if self.rank_major else b.view(n, part.rank)
            parts.append(PartDelta(part.col_start, part.col_stop, part.rank_start, part.rank_start + part.rank, b))
        return GroupDelta(a, tuple(parts))


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter in host memory, ready to be copied to the device in one piece."""

    data: Tensor
    layout: AdapterLayout

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def plan_layout(ranks: Mapping[tuple[int, str], int], base: BaseShape, *, rank_major: bool) -> AdapterLayout:
    """Lay out an adapter whose modules have these true ranks."""
    groups: dict[tuple[int, str], GroupPlace] = {}
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
    return AdapterLayout(groups, end, rank_major)


def build_image(
    weights: AdapterWeights, base: BaseShape, dtype: torch.dtype, *, pinned: bool, rank_major: bool = False
) -> AdapterImage:
    """Pack an adapter's factors into a fresh host image (page-locked if ``pinned``)."""
    ranks = {key: factors.a.shape[0] for key, factors in weights.factors.items()}
    layout = plan_layout(ranks, base, rank_major=rank_major)
    data = torch.zeros(layout.num_elements, dtype=dtype, pin_memory=pinned)
    for (layer, group), delta in layout.deltas(data).items():
        members = [m for m in GROUPS[group] if (layer, m) in ranks]
        for member, part in zip(members, delta.parts, strict=True):
            factors = weights.factors[layer, member]
            rank = factors.a.shape[0]
            delta.a[part.rank_start : part.rank_start + rank].copy_(factors.a)
            part.b[:, :rank].copy_(factors.b.float() * factors.scaling)
    return AdapterImage(data, layout)
