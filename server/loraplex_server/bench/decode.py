"""``loraplex bench decode``: milliseconds of one decode step, from the schedule to the tokens on the host.

A step counts when all sequences of the case decode in it and none is being read for the first time.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex_server.bench.cases import Case, Load, Mode, spread_ranks
from loraplex_server.bench.floor import copy_bytes_per_s, decode_bytes
from loraplex_server.bench.rig import LoadedBase, Rig, RigSize

# The first steps after the prompts still fill caches and pipelines.
_NUM_SETTLING = 3

Row = dict[str, Any]
OnRow = Callable[[Row], None]
"""Told of every row as soon as it is there."""


@dataclass(frozen=True)
class DecodePlan:
    """``ranks`` go to the adapters in turn. ``peer_cases``: what peers are measured on; empty: on all."""

    cases: tuple[Case, ...]
    modes: tuple[Mode, ...] = ("greedy",)
    ranks: tuple[int, ...] = (16,)
    prompt_tokens: int = 128
    new_tokens: int = 64
    seed: int = 0
    peer_cases: tuple[Case, ...] = ()

    @property
    def num_adapters(self) -> int:
        return max(case.adapters for case in self.cases)

    def load(self, case: Case) -> Load:
        return Load(case, self.prompt_tokens, self.new_tokens, self.seed)

    def columns(self) -> Row:
        return {
            "ranks": " ".join(map(str, self.ranks)),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seed": self.seed,
        }


def measure(base: LoadedBase, plan: DecodePlan, on_row: OnRow = lambda row: None) -> list[Row]:
    """Every case in every mode on our engine, after one of each as warm-up."""
    size = RigSize(
        max_running=max(case.batch for case in plan.cases),
        max_tokens=plan.prompt_tokens + plan.new_tokens,
        ranks=spread_ranks(plan.ranks, plan.num_adapters),
    )
    copy_rate = copy_bytes_per_s(base.decoder.device)
    rows = []
    with Rig(base, size) as rig:
        common = {**base.columns(), **plan.columns(), "engine_start_s": round(rig.build_s, 2)}
        for mode in plan.modes:
            for case in plan.cases:
                for _ in rig.run(Load(case, plan.prompt_tokens, 4).requests(rig.vocab_size, mode)):
                    pass
                row = {"engine": "loraplex", "mode": mode, **_run(rig, base, plan, case, mode, copy_rate), **common}
                rows.append(row)
                on_row(row)
    return rows


def _run(rig: Rig, base: LoadedBase, plan: DecodePlan, case: Case, mode: Mode, copy_rate: float) -> Row:
    device = base.decoder.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    before = 0
    for step in rig.run(plan.load(case).requests(rig.vocab_size, mode)):
        if not step.num_prefill and step.num_decode == case.batch:
            times.append(step.ms)
            if len(times) == _NUM_SETTLING - 1:  # a call that takes time, so never beside a step that counts
                before = _num_allocations(device)
    allocations = _num_allocations(device) - before
    if len(times) < _NUM_SETTLING + 2:
        raise ValueError(
            f"case {case}: {plan.new_tokens} new tokens leave too few steps to time; give more --new-tokens"
        )
    times = times[_NUM_SETTLING:]
    ranks = spread_ranks(plan.ranks, case.adapters)
    tokens = plan.prompt_tokens + plan.new_tokens / 2
    spec, dtype, quantization = base.decoder.spec, base.decoder.dtype, base.choice.quantization
    floor_ms = decode_bytes(spec, dtype, quantization, batch=case.batch, tokens=tokens, ranks=ranks) / copy_rate * 1e3
    median = statistics.median(times)
    return {
        "batch": case.batch,
        "adapters": case.adapters,
        **spread("ms_per_step", times),
        "steps": len(times),
        "output_tokens_per_s": round(case.batch / median * 1e3, 1),
        "floor_ms": round(floor_ms, 4),
        "times_floor": round(median / floor_ms, 3),
        "copy_tb_per_s": round(copy_rate / 1e12, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if device.type == "cuda" else "",
        "allocations_per_step": round(allocations / len(times), 2),
    }


def spread(name: str, values: Sequence[float]) -> Row:
    """Median, 10th and 90th percentile as columns."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    found = {"median": statistics.median(values), "p10": cuts[0], "p90": cuts[-1]}
    return {f"{name}_{key}": round(value, 4) for key, value in found.items()}


def _num_allocations(device: torch.device) -> int:
    """Blocks that torch handed out on the device so far; 0 where it does not count them."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("allocation.all.allocated", 0))
