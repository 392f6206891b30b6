"""What is counted of requests, by adapter and mode, with a cap on the adapters that are told apart."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator

from loraplex_server.histogram import (
    FIRST_TOKEN_BOUNDS,
    QUEUE_BOUNDS,
    REQUEST_BOUNDS,
    TOKEN_BOUNDS,
    Histogram,
)
from loraplex_server.observer import Mode, Outcome

BASE_LABEL = "base"
OTHER_LABEL = "other"

# An adapter gives its series up to another only after this long without a request: otherwise a thousand adapters in turn
# would make a thousand series, and the cap would cap nothing.
_IDLE_S = 300.0


class RequestSeries:
    """The counts of one adapter in one mode. Times in seconds."""

    __slots__ = ("first_token", "inter_token", "outcomes", "output_tokens", "prompt_tokens", "queue", "request")

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS)
        self.inter_token = Histogram(TOKEN_BOUNDS)
        self.request = Histogram(REQUEST_BOUNDS)
        self.queue = Histogram(QUEUE_BOUNDS)
        self.outcomes: Counter[Outcome] = Counter()
        self.prompt_tokens = 0
        self.output_tokens = 0

    def copy(self) -> "RequestSeries":
        """The same counts, for another thread to read."""
        copied = RequestSeries()
        for name in ("first_token", "inter_token", "outcomes", "queue", "request"):
            setattr(copied, name, getattr(self, name).copy())
        copied.prompt_tokens, copied.output_tokens = self.prompt_tokens, self.output_tokens
        return copied


class WatchedRequest:
    """One request: counted for its adapter and in the sum over all."""

    __slots__ = ("_all", "_own")

    def __init__(self, own: RequestSeries, all_requests: RequestSeries) -> None:
        self._own = own
        self._all = all_requests

    def on_first_token(self, seconds: float) -> None:
        self._own.first_token.observe(seconds)
        self._all.first_token.observe(seconds)

    def on_tokens(self, count: int, gap_s: float) -> None:
        # Tokens that arrive together share the gap before them.
        self._own.inter_token.observe_with(self._all.inter_token, gap_s / count, count)

    def on_finish(
        self, outcome: Outcome, *, seconds: float, prompt_tokens: int, output_tokens: int, queue_s: float | None
    ) -> None:
        for series in (self._own, self._all):
            series.outcomes[outcome] += 1
            series.prompt_tokens += prompt_tokens
            series.output_tokens += output_tokens
            if queue_s is not None:
                series.queue.observe(queue_s)
            # A refusal or a lost client says nothing about how long an answer takes.
            if outcome in ("stop", "length"):
                series.request.observe(seconds)


class SeriesByAdapter:
    """The series of the base, of the ``max_adapters`` adapters used most recently, and of all others as one."""

    def __init__(self, max_adapters: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.all_requests = RequestSeries()
        self._max_adapters = max_adapters
        self._clock = clock
        self._common: dict[tuple[str, Mode], RequestSeries] = {}
        self._adapters: OrderedDict[str, dict[Mode, RequestSeries]] = OrderedDict()
        self._used_at: dict[str, float] = {}

    def watch(self, adapter: str | None, mode: Mode) -> WatchedRequest:
        """The observer of one request."""
        if adapter is None:
            own = self._common.setdefault((BASE_LABEL, mode), RequestSeries())
        elif (modes := self._enter(adapter)) is not None:
            own = modes.setdefault(mode, RequestSeries())
        else:
            own = self._common.setdefault((OTHER_LABEL, mode), RequestSeries())
        return WatchedRequest(own, self.all_requests)

    def label(self, adapter: str) -> str:
        """What an adapter's series are labeled with at this moment."""
        return adapter if adapter in self._adapters else OTHER_LABEL

    def forget(self, adapter: str) -> None:
        """Drop the series of a retired adapter."""
        self._adapters.pop(adapter, None)
        self._used_at.pop(adapter, None)

    def keep(self, names: Collection[str]) -> None:
        """Drop the series of every adapter that is not among ``names``."""
        for adapter in [name for name in self._adapters if name not in names]:
            self.forget(adapter)

    def __iter__(self) -> Iterator[tuple[str, Mode, RequestSeries]]:
        for (label, mode), series in self._common.items():
            yield label, mode, series
        for adapter, modes in self._adapters.items():
            for mode, series in modes.items():
                yield adapter, mode, series

    def _enter(self, adapter: str) -> dict[Mode, RequestSeries] | None:
        """The adapter's place, just used, or None while all places are taken."""
        if adapter not in self._adapters:
            if adapter == OTHER_LABEL or not self._has_place():
                return None
            self._adapters[adapter] = {}
        self._adapters.move_to_end(adapter)
        self._used_at[adapter] = self._clock()
        return self._adapters[adapter]

    def _has_place(self) -> bool:
        if len(self._adapters) < self._max_adapters:
            return True
        oldest = next(iter(self._adapters), None)
        if oldest is None or self._clock() - self._used_at[oldest] < _IDLE_S:
            return False
        self.forget(oldest)
        return True
