"""What came back, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are seconds of the machine's monotonic clock.

    ``due_s`` is when it should have been sent: latencies count from there, so that a server that holds up its clients
    does not hide it. ``event_s``: when each piece of text came. ``error``: empty if all went well.
    """

    index: int
    model: str
    due_s: float
    sent_s: float
    event_s: Sequence[float] = ()
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def first_token_s(self) -> float | None:
        """From when it was due to the first piece of text; None if none came."""
        return self.event_s[0] - self.due_s if self.event_s else None

    @property
    def request_s(self) -> float:
        return self.end_s - self.due_s

    @property
    def per_token_s(self) -> float | None:
        """Mean time of a token after the first; None for answers of one."""
        if self.output_tokens < 2 or not self.event_s:
            return None
        return (self.event_s[-1] - self.event_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece of text and the next."""
        return [later - earlier for earlier, later in pairwise(self.event_s)]


@dataclass
class LoadResult:
    """All requests of a run. ``start_s``: the monotonic clock when the first could be sent."""

    start_s: float
    records: list[RequestRecord] = field(default_factory=list)
