"""A histogram that costs one bisection an observation; read by the metrics when they are scraped."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from itertools import accumulate


class Histogram:
    """Counts by upper bound. Not safe for several threads: the event loop owns it.

    ``bounds``: upper bounds in ascending order, without infinity.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count ``value``, ``count`` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self.total += value * count

    def observe_with(self, other: "Histogram", value: float, count: int = 1) -> None:
        """``observe`` in this one and in ``other``, which has the same bounds, for one search."""
        index, total = bisect_left(self._bounds, value), value * count
        self._counts[index] += count
        self.total += total
        other._counts[index] += count
        other.total += total

    def copy(self) -> "Histogram":
        """The same counts, for another thread to read."""
        copied = Histogram(self._bounds)
        copied._counts, copied.total = self._counts.copy(), self.total
        return copied

    @property
    def count(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound as Prometheus writes it, observations up to it)."""
        return list(zip(_written(tuple(self._bounds)), accumulate(map(float, self._counts)), strict=True))


@cache
def _written(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*(repr(float(bound)) for bound in bounds), "+Inf")


# Seconds. A token may take half a millisecond on a large GPU and a second on a laptop.
TOKEN_BOUNDS = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2,
    0.3, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
FIRST_TOKEN_BOUNDS = (
    0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0,
    3.0, 5.0, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BOUNDS = (
    0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0,
    120.0, 300.0, 600.0,
)  # fmt: skip
QUEUE_BOUNDS = (
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 120.0,
)  # fmt: skip
STEP_BOUNDS = (
    0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08,
    0.12, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0,
)  # fmt: skip
LOAD_BOUNDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0)
