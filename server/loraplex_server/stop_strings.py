"""Ends a text at the first of several strings, wherever the pieces it arrives in are cut."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until a stop string appears; the string itself, and all after it, is not passed.

    The end of the text so far is held back while it may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    @property
    def num_held(self) -> int:
        """Characters held back now."""
        return len(self._held)

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended it."""
        if not self._stops:
            return text, False
        text = self._held + text
        self._held = ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        keep = self._num_undecided(text)
        if keep:
            self._held = text[-keep:]
            text = text[:-keep]
        return text, False

    def flush(self) -> str:
        """What is held back when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_undecided(self, text: str) -> int:
        """The length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
