"""Other engines on the same load in the same run: transformers + peft, and vLLM where it is installed."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loraplex_server.bench.cases import Load
from loraplex_server.bench.decode import DecodePlan, OnRow
from loraplex_server.bench.prefill import PrefillPlan, row_of
from loraplex_server.bench.rig import BaseChoice

Row = dict[str, Any]

# Steps that a peer's decode is timed over: a step of its may take hundreds of times one of ours.
_SHORT_TOKENS, _LONG_TOKENS = 4, 20
# So often, unless that takes longer than this.
_REPEATS, _ENOUGH_S = 2, 3.0


class PeerUnavailable(Exception):
    """The peer cannot run here; the message says why."""


class Peer(Protocol):
    """An engine that generates one batch, greedily."""

    name: str

    def seconds(self, load: Load) -> float:
        """Generate this batch once."""

    def close(self) -> None:
        """Give back what it holds."""


@dataclass(frozen=True)
class PeerSize:
    """What a peer must be ready for. ``ranks``: of each adapter. ``scratch``: a folder for its files."""

    base: BaseChoice
    ranks: tuple[int, ...]
    max_batch: int
    max_tokens: int
    scratch: Path


def open_peer(name: str, size: PeerSize) -> Peer:
    """Raises PeerUnavailable."""
    return PEERS[name](size)


def _transformers(size: PeerSize) -> Peer:
    from loraplex_server.bench.transformers_peer import TransformersPeer

    return TransformersPeer(size, quantization="nf4")


def _transformers_plain(size: PeerSize) -> Peer:
    from loraplex_server.bench.transformers_peer import TransformersPeer

    return TransformersPeer(size, quantization="none")


def _vllm(size: PeerSize) -> Peer:
    from loraplex_server.bench.vllm_peer import VllmPeer

    return VllmPeer(size, quantization="nf4")


def _vllm_plain(size: PeerSize) -> Peer:
    from loraplex_server.bench.vllm_peer import VllmPeer

    return VllmPeer(size, quantization="none")


PEERS: dict[str, Callable[[PeerSize], Peer]] = {
    "transformers": _transformers,
    "transformers-plain": _transformers_plain,
    "vllm": _vllm,
    "vllm-plain": _vllm_plain,
}
"""Those without ``-plain`` hold their base in NF4, as ours does."""


def measure_decode(
    names: Sequence[str],
    size: PeerSize,
    plan: DecodePlan,
    ours: Sequence[Row],
    on_row: OnRow,
    on_skip: Callable[[str], None],
) -> list[Row]:
    """Milliseconds a step of every peer: the time of many new tokens less that of few, over their difference.

    ``ours``: our rows, for the ratios. Greedy only.
    """

    def run(peer: Peer) -> list[Row]:
        return [_decode_row(peer, plan, load) for load in _in_order(plan)]

    return _measure(names, size, run, ours, ("batch", "adapters"), "ms_per_step_median", on_row, on_skip)


def _in_order(plan: DecodePlan) -> list[Load]:
    """Cases without adapters first: they run on the peer's bare base."""
    return [plan.load(case) for case in sorted(plan.peer_cases or plan.cases, key=lambda case: bool(case.adapters))]


def _decode_row(peer: Peer, plan: DecodePlan, load: Load) -> Row:
    def generate(new_tokens: int) -> float:
        return peer.seconds(Load(load.case, load.prompt_tokens, new_tokens, load.seed))

    long = min(_LONG_TOKENS, max(plan.new_tokens, _SHORT_TOKENS + 1))
    generate(2)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _REPEATS and (not times or time.perf_counter() - began < _ENOUGH_S):
        times.append((generate(long) - generate(_SHORT_TOKENS)) / (long - _SHORT_TOKENS) * 1e3)
    ms = min(times)
    return {
        "engine": peer.name,
        "mode": "greedy",
        "batch": load.case.batch,
        "adapters": load.case.adapters,
        "ms_per_step_median": round(ms, 4),
        "ms_per_step_p10": round(ms, 4),
        "ms_per_step_p90": round(max(times), 4),
        "steps": len(times) * (long - _SHORT_TOKENS),
        "output_tokens_per_s": round(load.case.batch / ms * 1e3, 1),
        "shape": "",
        **plan.columns(),
    }


def measure_prefill(
    names: Sequence[str],
    size: PeerSize,
    plan: PrefillPlan,
    ours: Sequence[Row],
    on_row: OnRow,
    on_skip: Callable[[str], None],
) -> list[Row]:
    """Prompt tokens a second of every peer: one new token of every prompt."""

    def run(peer: Peer) -> list[Row]:
        rows = []
        for case in sorted(plan.peer_cases or plan.cases, key=lambda case: bool(case.adapters)):
            for length in plan.lengths:
                times = [peer.seconds(plan.load(case, length, repeat)) for repeat in range(-1, plan.repeats)][1:]
                rates = [case.batch * length / seconds for seconds in times]
                first_ms = round(statistics.median(times) * 1e3, 4)
                rows.append({"engine": peer.name, **row_of(case, length, rates), "first_token_ms_median": first_ms})
        return rows

    keys = ("batch", "adapters", "prompt_tokens")
    return _measure(names, size, run, ours, keys, "prefill_tokens_per_s", on_row, on_skip)


def _measure(
    names: Sequence[str],
    size: PeerSize,
    run: Callable[[Peer], list[Row]],
    ours: Sequence[Row],
    keys: tuple[str, ...],
    value: str,
    on_row: OnRow,
    on_skip: Callable[[str], None],
) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        try:
            peer = open_peer(name, size)
        except PeerUnavailable as error:
            on_skip(f"{name} is left out: {error}")
            continue
        try:
            on_skip(f"{peer.name}:")
            for row in run(peer):
                row |= {"shape": size.base.name, "ratio": ratio(row, ours, keys, value)}
                rows.append(row)
                on_row(row)
        except RuntimeError as error:
            on_skip(f"{name} broke off: {error}")
        finally:
            peer.close()
            del peer
            gc.collect()
    return rows


def ratio(row: Row, ours: Sequence[Row], keys: tuple[str, ...], value: str) -> float | str:
    """How many times as fast ours is in the same case; empty if ours has none. Times (ms) and rates both work."""
    same = [
        mine for mine in ours if all(mine[key] == row[key] for key in keys) and mine.get("mode", "greedy") == "greedy"
    ]
    if not same:
        return ""
    theirs, mine = float(row[value]), float(same[0][value])
    return round(theirs / mine if value.startswith("ms_") else mine / theirs, 2)
