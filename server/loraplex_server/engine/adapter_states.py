"""What is reported of every adapter, brought up to date from what has changed: thousands may be in memory, few move."""

from collections.abc import Mapping

from loraplex_server.engine.messages import AdapterState
from loraplex_server.engine.residency import AdapterResidency


class AdapterStates:
    """The last states that were reported, by digest."""

    def __init__(self) -> None:
        self._states: dict[str, AdapterState] = {}
        self._counts: Mapping[str, tuple[int, int]] = {}

    def now(self, residency: AdapterResidency, counts: Mapping[str, tuple[int, int]]) -> Mapping[str, AdapterState]:
        """The states of all adapters that are in memory or have requests.

        ``counts``: (running, waiting) of those that have requests. The same objects come again for what has not changed;
        the mapping itself is never changed once it was given out.
        """
        # Copied once a report: a microsecond for a hundred adapters, where making their states anew takes a hundred.
        states = self._states.copy()
        before = self._counts
        recounted = {digest for digest, count in counts.items() if before.get(digest) != count}
        for digest in residency.take_changed() | recounted | (before.keys() - counts.keys()):
            if digest in counts or residency.is_known(digest):
                tier, num_bytes, pinned = residency.where(digest)
                running, waiting = counts.get(digest, (0, 0))
                state = AdapterState(tier, num_bytes, running, waiting, pinned)
                if states.get(digest) != state:
                    states[digest] = state
            else:
                states.pop(digest, None)
        self._counts = counts
        self._states = states
        return states
