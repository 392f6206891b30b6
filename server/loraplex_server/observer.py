"""What the HTTP side tells the metrics about each generation request; implemented by the metrics, fakes in tests."""

from typing import Literal, Protocol

Mode = Literal["base", "unmerged", "merged"]
Outcome = Literal["stop", "length", "abort", "rejected", "error"]


class RequestObserver(Protocol):
    """Follows one HTTP generation request from its submission to its end. All times are seconds; never blocks.

    A request with ``n`` choices or several prompts is one request: its tokens are counted together.
    """

    def on_first_token(self, seconds: float) -> None:
        """The first token of any choice arrived, ``seconds`` after the request was submitted. At most once."""

    def on_tokens(self, count: int, gap_s: float) -> None:
        """``count`` >= 1 tokens of one choice arrived together, ``gap_s`` after that choice's previous tokens.

        Not called for a choice's first tokens.
        """

    def on_finish(
        self, outcome: Outcome, *, seconds: float, prompt_tokens: int, output_tokens: int, queue_s: float | None
    ) -> None:
        """The request ended; always called, exactly once.

        ``outcome``: "stop" or "length" as answered (of several choices, "length" if any is), "abort" if the client
        left, "rejected" if the engine took no more work, "error" if it failed. ``queue_s`` is the longest wait of its
        choices before their first step, None if none of them ran.
        """


class RequestObservers(Protocol):
    """Makes one observer for each request."""

    def start(self, adapter: str | None, mode: Mode) -> RequestObserver:
        """A request for the adapter of this name (None: the base) is about to be submitted to the engine."""


class NullObserver:
    """Observes nothing: metrics are switched off."""

    def start(self, adapter: str | None, mode: Mode) -> RequestObserver:
        return self

    def on_first_token(self, seconds: float) -> None:
        return None

    def on_tokens(self, count: int, gap_s: float) -> None:
        return None

    def on_finish(
        self, outcome: Outcome, *, seconds: float, prompt_tokens: int, output_tokens: int, queue_s: float | None
    ) -> None:
        return None
