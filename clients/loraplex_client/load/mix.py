"""Which model each request names."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Mix:
    """As text: ``uniform``, ``zipf:1.1`` (the n-th model as often as n to the -1.1), ``distinct`` (one after the other,
    so that requests at once name different ones), ``one`` (the first alone)."""

    text: str = "distinct"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"uniform|distinct|one|zipf:\d*\.?\d+", self.text):
            raise ValueError(f"{self.text!r} is no mix; write uniform, zipf:1.1, distinct or one")

    def weights(self, num_models: int) -> list[float]:
        """Cumulative weights, for ``choose``."""
        alpha = float(self.text.partition(":")[2] or 0)
        return list(accumulate(rank**-alpha for rank in range(1, num_models + 1)))

    def choose(self, models: Sequence[str], weights: Sequence[float], index: int, rng: random.Random) -> str:
        """The model of request ``index``."""
        if self.text == "one":
            return models[0]
        if self.text == "distinct":
            return models[index % len(models)]
        return rng.choices(models, cum_weights=weights)[0]
