"""An adapter as one flat run of numbers, laid out the way the kernels read it.

For every layer and fused group the image holds the stacked A rows ``[R_group, K]`` and then each part's B: row-major
``[N_part, R_part]`` for the GPU's kernels, ``[R_part, N_part]`` (``rank_major``) for a CPU, whose matrix products of a
few rows take a third of the time that way. alpha / r (or alpha / sqrt(r)) is folded into B once, in float32, and each part's
rank is padded with zeros to a multiple of 8, so that rows stay 16-byte aligned at 16-bit precision. Memory and time
follow the true ranks of each module; there is no ceiling to choose.

A group with DoRA or trained biases has an *epilogue* behind its B: two float32 vectors over all of the group's outputs,
factor [N] and shift [N], whatever the image's dtype (see ``GroupDelta``). LoRA on the embeddings and the head lies in
groups of its own, "embed" and "head" of layer -1; what else is trained outside the linears lies at the image's end
(``engine.image_outside``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape, ModuleKey
from loraplex_adapters.format import AdapterWeights
from loraplex_server.engine.epilogue import Epilogue
from loraplex_server.engine.image_outside import OutsidePlace, float32_at, float32_elements
from loraplex_server.kernels.lora_ref import GroupDelta, PartDelta
from loraplex_server.model.adapters import GROUPS, OutsideParts

RANK_ALIGNMENT = 8
# Modules outside the layers that LoRA can change, as groups of layer -1.
OUTSIDE_GROUPS = {"embed": ("embed_tokens",), "head": ("lm_head",)}


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
    """One group's factors inside an image: A is [rank, k] at ``offset``.

    ``epilogue``: offset of factor [num_out] and then shift [num_out], both float32; None without them. A group can have
    an epilogue and no ranks.
    """

    offset: int
    rank: int
    k: int
    parts: tuple[PartPlace, ...]
    num_out: int
    epilogue: int | None = None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AdapterLayout:
    """Where everything lies in an adapter's image. ``num_elements`` is the image's length; ``padded`` if some rank is.

    Shared by adapters that are alike, and compared by identity.
    """

    groups: Mapping[tuple[int, str], GroupPlace]
    num_elements: int
    rank_major: bool
    padded: bool
    outside: OutsidePlace | None = None

    @property
    def has_epilogues(self) -> bool:
        """Whether any group has a factor and a shift."""
        return any(place.epilogue is not None for place in self.groups.values())

    @property
    def is_plain(self) -> bool:
        """Whether it is low-rank factors of the layers' linears and nothing else, as the GPU's kernels know them."""
        return self.outside is None and not self.has_epilogues

    def outside_parts(self, image: Tensor) -> OutsideParts | None:
        """What is changed outside the layers' linears, as views into ``image``."""
        if self.outside is None:
            return None
        return self.outside.parts(image, self.delta(image, (-1, "embed")), self.delta(image, (-1, "head")))

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
        if place.epilogue is None:
            return GroupDelta(a, tuple(parts))
        epilogue = float32_at(image, place.epilogue, 2 * place.num_out)
        return GroupDelta(a, tuple(parts), epilogue[: place.num_out], epilogue[place.num_out :])

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


@dataclass(frozen=True, slots=True)
class ExtraPlan:
    """What an image holds beyond low-rank factors of the layers' linears.

    ``epilogues``: the groups that have one. ``outside``: sizes of what lies at the image's end.
    ``vocab_sizes``: rows of the embeddings and of the head as the adapter has them.
    """

    epilogues: frozenset[tuple[int, str]] = frozenset()
    outside: OutsidePlace | None = None
    vocab_sizes: tuple[int, int] = (0, 0)


def group_of(module: ModuleKey) -> tuple[int, str]:
    """The group that a linear is a part of."""
    layer, name = module
    groups = GROUPS if layer >= 0 else OUTSIDE_GROUPS
    return layer, next(group for group, members in groups.items() if name in members)


def plan_layout(
    ranks: Mapping[ModuleKey, int],
    base: BaseShape,
    *,
    rank_major: bool,
    itemsize: int = 4,
    extra: ExtraPlan | None = None,
) -> AdapterLayout:
    """Lay out an adapter whose modules have these true ranks."""
    extra = extra or ExtraPlan()
    num_embed, num_head = extra.vocab_sizes
    shapes = {(-1, "embed_tokens"): (base.hidden_size, num_embed), (-1, "lm_head"): (num_head, base.hidden_size)}
    groups: dict[tuple[int, str], GroupPlace] = {}
    end = 0
    for layer in (*range(base.num_layers), -1):
        for group, members in (GROUPS if layer >= 0 else OUTSIDE_GROUPS).items():
            present = {
                m: -(-ranks[layer, m] // RANK_ALIGNMENT) * RANK_ALIGNMENT for m in members if (layer, m) in ranks
            }
            has_epilogue = (layer, group) in extra.epilogues
            if not present and not has_epilogue:
                continue
            sizes = [base.linears[m] if layer >= 0 else shapes[layer, m] for m in members]
            k = sizes[0][1]
            total = sum(present.values())
            start = end
            end += total * k
            parts = []
            column = rank_start = 0
            for member, (n, _) in zip(members, sizes, strict=True):
                if member in present:
                    rank = present[member]
                    parts.append(PartPlace(end, column, column + n, rank_start, rank))
                    rank_start += rank
                    end += n * rank
                column += n
            epilogue = end if has_epilogue else None
            end += float32_elements(2 * column, itemsize) if has_epilogue else 0
            groups[layer, group] = GroupPlace(start, total, k, tuple(parts), column, epilogue)
    padded = any(rank % RANK_ALIGNMENT for rank in ranks.values())
    outside = extra.outside.at(end, itemsize) if extra.outside else None
    return AdapterLayout(groups, outside.end if outside else end, rank_major, padded, outside)


def build_image(
    weights: AdapterWeights, base: BaseShape, dtype: torch.dtype, *, pinned: bool, rank_major: bool = False
) -> AdapterImage:
    """Pack a plain adapter's factors into a fresh host image (page-locked if ``pinned``)."""
    layout = plan_layout(weights.ranks, base, rank_major=rank_major)
    data = torch.empty(layout.num_elements, dtype=dtype, pin_memory=pinned)
    fill_image(data, weights, layout)
    return AdapterImage(data, layout)


def fill_image(
    data: Tensor,
    weights: AdapterWeights,
    layout: AdapterLayout,
    epilogues: Mapping[tuple[int, str], Epilogue] | None = None,
) -> None:
    """Write an adapter's factors into ``data`` [num_elements], scaling included, and what goes with them."""
    if layout.padded:
        data.zero_()
    for (layer, group), delta in layout.deltas(data).items():
        members = (GROUPS if layer >= 0 else OUTSIDE_GROUPS)[group]
        present = [m for m in members if (layer, m) in weights.factors]
        for member, part in zip(present, delta.parts, strict=True):
            factors = weights.factors[layer, member]
            rank = factors.a.shape[0]
            delta.a[part.rank_start : part.rank_start + rank].copy_(factors.a)
            part.b[:, :rank].copy_(factors.b.float() * factors.scaling)
        if delta.factor is not None and delta.shift is not None:
            assert epilogues is not None
            delta.factor.copy_(epilogues[layer, group].factor)
            delta.shift.copy_(epilogues[layer, group].shift)
    if layout.outside is not None:
        layout.outside.fill(data, weights)
