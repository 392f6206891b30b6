"""Small dense numbers for resident adapters."""

import heapq


class Slots:
    """Hands out the lowest free number, so that tables indexed by it stay short."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 0

    def take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def give(self, slot: int) -> None:
        heapq.heappush(self._free, slot)
