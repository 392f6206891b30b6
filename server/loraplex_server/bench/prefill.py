"""``loraplex bench prefill``: prompt tokens a second, and milliseconds to the first token, of N prompts at once."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

from loraplex_server.bench.cases import Case, Load, spread_ranks
from loraplex_server.bench.decode import OnRow, spread
from loraplex_server.bench.rig import LoadedBase, Rig, RigSize

Row = dict[str, Any]


@dataclass(frozen=True)
class PrefillPlan:
    """Each case is so many prompts of each length, all submitted at once, ``repeats`` times.

    ``peer_cases``: what peers are measured on; empty: on all.
    """

    cases: tuple[Case, ...]
    lengths: tuple[int, ...] = (1024,)
    ranks: tuple[int, ...] = (16,)
    repeats: int = 3
    max_batched_tokens: int = 8192
    seed: int = 0
    peer_cases: tuple[Case, ...] = ()

    @property
    def num_adapters(self) -> int:
        return max(case.adapters for case in self.cases)

    def load(self, case: Case, length: int, repeat: int) -> Load:
        """One new token ends the request, so that nothing but prompts is read."""
        return Load(case, length, 1, self.seed + repeat)

    def columns(self) -> Row:
        return {"ranks": " ".join(map(str, self.ranks)), "repeats": self.repeats, "seed": self.seed}


def measure(base: LoadedBase, plan: PrefillPlan, on_row: OnRow = lambda row: None) -> list[Row]:
    """Every case at every length on our engine, after one as warm-up."""
    size = RigSize(
        max_running=max(case.batch for case in plan.cases),
        max_tokens=max(plan.lengths) + 1,
        ranks=spread_ranks(plan.ranks, plan.num_adapters),
        max_batched_tokens=plan.max_batched_tokens,
    )
    rows = []
    with Rig(base, size) as rig:
        common = {**base.columns(), "max_batched_tokens": plan.max_batched_tokens, **plan.columns()}
        for length in plan.lengths:
            for case in plan.cases:
                row = {"engine": "loraplex", **_run(rig, plan, case, length), **common}
                rows.append(row)
                on_row(row)
    return rows


def _run(rig: Rig, plan: PrefillPlan, case: Case, length: int) -> Row:
    rates, first_ms = [], []
    for repeat in range(-1, plan.repeats):
        requests = plan.load(case, length, repeat).requests(rig.vocab_size)
        began = ended = time.perf_counter()
        waits: list[float] = []
        for step in rig.run(requests):
            ended = step.at_s
            waits += [(step.at_s - began) * 1e3] * len(step.started)
        if repeat >= 0:
            rates.append(case.batch * length / (ended - began))
            first_ms += waits
    return row_of(case, length, rates) | spread("first_token_ms", first_ms if len(first_ms) > 1 else first_ms * 2)


def row_of(case: Case, length: int, rates: list[float]) -> Row:
    """What any engine's runs say: the median of its rates and their range."""
    return {
        "batch": case.batch,
        "adapters": case.adapters,
        "prompt_tokens": length,
        "prefill_tokens_per_s": round(statistics.median(rates), 1),
        "prefill_tokens_per_s_min": round(min(rates), 1),
        "prefill_tokens_per_s_max": round(max(rates), 1),
    }
