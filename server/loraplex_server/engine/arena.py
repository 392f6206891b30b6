"""One block of device memory that adapters of any size share: first fit, and compaction when holes are in the way.

Device copies run at terabytes a second, so closing holes costs well under a step's time and spares every kernel an
indirection that a paged layout would need.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Elements; keeps every allocation 256-byte aligned at 16 bits.
_ALIGNMENT = 128
# Bounds the scratch memory that moving overlapping ranges takes.
_MOVE_ELEMENTS = 16 * 2**20


@dataclass(slots=True, eq=False)
class Extent:
    """A run of the arena, in elements. ``start`` changes when the arena is compacted."""

    start: int
    size: int


class Arena:
    """Contiguous extents in one flat device tensor. Owned by the engine thread."""

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data: Tensor = torch.zeros(num_elements, dtype=dtype, device=device)
        self._extents: list[Extent] = []

    @property
    def num_elements(self) -> int:
        return self.data.numel()

    @property
    def num_used(self) -> int:
        return sum(extent.size for extent in self._extents)

    @property
    def num_free(self) -> int:
        return self.num_elements - self.num_used

    @staticmethod
    def rounded(num_elements: int) -> int:
        return -(-max(num_elements, 1) // _ALIGNMENT) * _ALIGNMENT

    def allocate(self, num_elements: int) -> Extent | None:
        """The first hole that is large enough; None if there is none (compaction may make one)."""
        size = self.rounded(num_elements)
        cursor = 0
        for i, extent in enumerate(self._extents):
            if extent.start - cursor >= size:
                self._extents.insert(i, Extent(cursor, size))
                return self._extents[i]
            cursor = extent.start + extent.size
        if self.num_elements - cursor < size:
            return None
        self._extents.append(Extent(cursor, size))
        return self._extents[-1]

    def free(self, extent: Extent) -> None:
        self._extents.remove(extent)

    def view(self, extent: Extent) -> Tensor:
        return self.data[extent.start : extent.start + extent.size]

    def compact(self) -> list[Extent]:
        """Move every extent as far to the front as it goes; returns those that moved. Content is kept."""
        moved = []
        cursor = 0
        for extent in self._extents:
            if extent.start != cursor:
                self._move(extent.start, cursor, extent.size)
                extent.start = cursor
                moved.append(extent)
            cursor += extent.size
        return moved

    def _move(self, source: int, target: int, size: int) -> None:
        # Front to back in pieces through a copy, since source and target may overlap.
        for offset in range(0, size, _MOVE_ELEMENTS):
            n = min(_MOVE_ELEMENTS, size - offset)
            piece = self.data[source + offset : source + offset + n].clone()
            self.data[target + offset : target + offset + n].copy_(piece)
