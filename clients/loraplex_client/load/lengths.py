"""How long prompts and answers are: one length, or a distribution of them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

_FORMS = re.compile(
    r"(?P<fixed>\d+)|uniform:(?P<least>\d+):(?P<most>\d+)|lognormal:(?P<median>\d+):(?P<sigma>\d*\.?\d+)"
)

# A distribution without an end would now and then ask for more than any context holds.
_LONGEST_OF_MEDIAN = 8


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, as text: ``128``, ``uniform:64:256``, ``lognormal:128:0.6`` (median, sigma).

    Draws of ``lognormal`` end at eight times the median.
    """

    text: str

    def __post_init__(self) -> None:
        match = _FORMS.fullmatch(self.text)
        wrong = match is None or (match["least"] is not None and int(match["least"]) > int(match["most"]))
        if wrong or self.longest < 1:
            raise ValueError(f"{self.text!r} is no length; write 128, uniform:64:256 or lognormal:128:0.6")

    def draw(self, rng: random.Random) -> int:
        """One length, at least 1."""
        kind, *numbers = self._parts()
        if kind == "uniform":
            return max(1, rng.randint(int(numbers[0]), int(numbers[1])))
        if kind == "lognormal":
            length = round(int(numbers[0]) * rng.lognormvariate(0, float(numbers[1])))
            return min(max(1, length), self.longest)
        return int(numbers[0])

    @property
    def longest(self) -> int:
        """No draw is longer."""
        kind, *numbers = self._parts()
        if kind == "uniform":
            return int(numbers[1])
        return int(numbers[0]) * (_LONGEST_OF_MEDIAN if kind == "lognormal" else 1)

    @property
    def typical(self) -> int:
        """The middle: what an engine that takes one length for all is given."""
        kind, *numbers = self._parts()
        return (int(numbers[0]) + int(numbers[1])) // 2 if kind == "uniform" else int(numbers[0])

    def _parts(self) -> list[str]:
        return self.text.split(":") if ":" in self.text else ["fixed", self.text]
