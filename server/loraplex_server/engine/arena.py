"""One block of device memory that adapters of any size share.

Device copies run at terabytes a second, so closing holes costs well under a step's time and spares every kernel an
indirection that a paged layout would need.
"""

import torch
from torch import Tensor

from loraplex_server.engine.extents import Extent, Extents, Opening

# Bounds the scratch memory that moving overlapping ranges takes.
_MOVE_ELEMENTS = 16 * 2**20


class Arena(Extents):
    """Contiguous extents in one flat device tensor. Owned by the engine thread."""

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(num_elements)
        self.data: Tensor = torch.zeros(num_elements, dtype=dtype, device=device)

    def view(self, extent: Extent) -> Tensor:
        return self.data[extent.start : extent.stop]

    def make(self, opening: Opening) -> list[Extent]:
        """Move what is in the way of an opening; returns the extents that have a new place. Content is kept."""
        moved = []
        cursor = opening.start
        for extent in opening.moves:
            if extent.start != cursor:
                self._move(extent.start, cursor, extent.size)
                extent.start = cursor
                moved.append(extent)
            cursor = extent.stop
        return moved

    def _move(self, source: int, target: int, size: int) -> None:
        # Front to back in pieces through a copy, since source and target may overlap.
        for offset in range(0, size, _MOVE_ELEMENTS):
            n = min(_MOVE_ELEMENTS, size - offset)
            piece = self.data[source + offset : source + offset + n].clone()
            self.data[target + offset : target + offset + n].copy_(piece)
