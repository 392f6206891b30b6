"""Which parts of a stretch of memory are taken: first fit, and what would have to move to make one hole of several."""

from collections.abc import Collection
from dataclasses import dataclass

# Elements; keeps every allocation 256-byte aligned at 16 bits.
_ALIGNMENT = 128


@dataclass(slots=True, eq=False)
class Extent:
    """A run of elements. ``start`` changes when it is moved; a ``held`` one stays where it is."""

    start: int
    size: int
    held: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Opening:
    """Where an extent could go once ``moves`` have been pushed together from ``start`` on, in order."""

    start: int
    moves: tuple[Extent, ...] = ()


class Extents:
    """The extents in ``num_elements`` elements, by place."""

    def __init__(self, num_elements: int) -> None:
        self.num_elements = num_elements
        self.num_used = 0
        self._taken: list[Extent] = []

    @staticmethod
    def rounded(num_elements: int) -> int:
        return -(-max(num_elements, 1) // _ALIGNMENT) * _ALIGNMENT

    @property
    def num_free(self) -> int:
        return self.num_elements - self.num_used

    @property
    def is_empty(self) -> bool:
        return not self._taken

    def allocate(self, num_elements: int) -> Extent | None:
        """The first hole that is large enough; None if there is none."""
        size = self.rounded(num_elements)
        cursor = 0
        for i, extent in enumerate(self._taken):
            if extent.start - cursor >= size:
                return self._take(i, Extent(cursor, size))
            cursor = extent.stop
        if self.num_elements - cursor < size:
            return None
        return self._take(len(self._taken), Extent(cursor, size))

    def _take(self, index: int, extent: Extent) -> Extent:
        self._taken.insert(index, extent)
        self.num_used += extent.size
        return extent

    def free(self, extent: Extent) -> None:
        self._taken.remove(extent)
        self.num_used -= extent.size

    def find(self, num_elements: int, without: Collection[Extent] = ()) -> Opening | None:
        """Where an extent could go if those in ``without`` were freed, with the fewest elements moved; None: nowhere."""
        size = self.rounded(num_elements)
        gone = set(map(id, without))
        taken = [extent for extent in self._taken if id(extent) not in gone]
        # Windows of neighbors, from the end of the extent before them to the start of the one after.
        ends = [0, *(extent.stop for extent in taken)]
        starts = [*(extent.start for extent in taken), self.num_elements]
        best: tuple[int, int, int] | None = None
        first, occupied = 0, 0
        for after in range(len(taken) + 1):
            if after and taken[after - 1].held:
                first, occupied = after, 0
            elif after:
                occupied += taken[after - 1].size
            while first < after and starts[after] - ends[first + 1] - (occupied - taken[first].size) >= size:
                occupied -= taken[first].size
                first += 1
            if starts[after] - ends[first] - occupied >= size and (best is None or occupied < best[0]):
                best = (occupied, first, after)
        return None if best is None else Opening(ends[best[1]], tuple(taken[best[1] : best[2]]))
