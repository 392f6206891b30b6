"""Runs of ``decode``, ``prefill`` and ``adapters``: load the base, measure ours, then the peers, and write what came out."""

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from loraplex_server.bench import adapters, decode, peers, plot, prefill
from loraplex_server.bench.adapters import AdaptersPlan
from loraplex_server.bench.adapters_plot import adapters_plot
from loraplex_server.bench.cases import Case, spread_ranks
from loraplex_server.bench.decode import DecodePlan
from loraplex_server.bench.output import Column, Output
from loraplex_server.bench.peers import PeerSize
from loraplex_server.bench.prefill import PrefillPlan
from loraplex_server.bench.rig import BaseChoice, LoadedBase, load_base

_DECODE = (
    Column("engine", "engine"),
    Column("mode", "mode"),
    Column("batch", "batch"),
    Column("adapters", "adapters"),
    Column("ms/step", "ms_per_step_median", 3),
    Column("p10", "ms_per_step_p10", 3),
    Column("p90", "ms_per_step_p90", 3),
    Column("tokens/s", "output_tokens_per_s", 0),
    Column("floor ms", "floor_ms", 3),
    Column("x floor", "times_floor"),
    Column("allocations/step", "allocations_per_step", 1),
    Column("peak GB", "peak_gb"),
    Column("ours is faster by", "ratio"),
)
_PREFILL = (
    Column("engine", "engine"),
    Column("prompts", "batch"),
    Column("adapters", "adapters"),
    Column("tokens each", "prompt_tokens"),
    Column("tokens/s", "prefill_tokens_per_s", 0),
    Column("min", "prefill_tokens_per_s_min", 0),
    Column("max", "prefill_tokens_per_s_max", 0),
    Column("first token ms, median", "first_token_ms_median", 1),
    Column("p90", "first_token_ms_p90", 1),
    Column("ours is faster by", "ratio"),
)

_ADAPTERS = (
    Column("engine", "engine"),
    Column("what", "what"),
    Column("rank", "rank"),
    Column("MB", "mb", 0),
    Column("registered", "registered"),
    Column("count", "count"),
    Column("p50 ms", "ms_p50"),
    Column("p95", "ms_p95"),
    Column("p99", "ms_p99"),
    Column("max", "ms_max"),
    Column("loads", "loads"),
    Column("from disk", "loads_from_disk"),
    Column("requests/s", "requests_per_s"),
    Column("of the first", "ratio", 3),
)


def run_decode(choice: BaseChoice, plan: DecodePlan, peer_names: Sequence[str], out: Path) -> Output:
    """``decode_SHAPE.csv`` and ``.png`` in ``out``."""
    output = Output(out, f"decode_{choice.name}", _DECODE)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        base = _load(choice, Path(scratch), output)
        ours = decode.measure(base, plan, output.add)
        del base
        gc.collect()
        size = _peer_size(
            choice, plan.ranks, plan.peer_cases or plan.cases, plan.prompt_tokens + plan.new_tokens, Path(scratch)
        )
        peers.measure_decode(peer_names, size, plan, ours, output.add, output.note)
    output.finish(plot.decode_plot)
    return output


def run_prefill(choice: BaseChoice, plan: PrefillPlan, peer_names: Sequence[str], out: Path) -> Output:
    """``prefill_SHAPE.csv`` and ``.png`` in ``out``."""
    output = Output(out, f"prefill_{choice.name}", _PREFILL)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        base = _load(choice, Path(scratch), output)
        ours = prefill.measure(base, plan, output.add)
        del base
        gc.collect()
        size = _peer_size(choice, plan.ranks, plan.peer_cases or plan.cases, max(plan.lengths) + 1, Path(scratch))
        peers.measure_prefill(peer_names, size, plan, ours, output.add, output.note)
    output.finish(plot.prefill_plot)
    return output


def run_adapters(choice: BaseChoice, plan: AdaptersPlan, out: Path) -> Output:
    """``adapters_SHAPE.csv`` and ``.png`` in ``out``."""
    output = Output(out, f"adapters_{choice.name}", _ADAPTERS)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        base = _load(choice, Path(scratch), output)
        most = max(plan.registered, default=0)
        if most > plan.num_files:
            output.note(
                f"{most} adapters come from {plan.num_files} files: each has memory of its own on the device and on the "
                "host, but reading one may find its file in the page cache because of another"
            )
        adapters.measure(base, plan, output.add)
    output.finish(adapters_plot)
    return output


def _load(choice: BaseChoice, scratch: Path, output: Output) -> LoadedBase:
    base = load_base(choice, scratch)
    held = f"{base.decoder.weight_bytes / 1e9:.2f} GB of weights"
    if base.peak_bytes:
        held += f", {base.peak_bytes / 1e9:.2f} GB at the peak"
    name = torch.cuda.get_device_name() if choice.device.type == "cuda" else "the CPU"
    output.note(f"{choice.name} in {choice.quantization} on {name}: loaded in {base.load_s:.1f} s, {held}")
    return base


def _peer_size(
    choice: BaseChoice, ranks: Sequence[int], cases: Sequence[Case], max_tokens: int, scratch: Path
) -> PeerSize:
    num_adapters = max(case.adapters for case in cases)
    return PeerSize(choice, spread_ranks(ranks, num_adapters), max(case.batch for case in cases), max_tokens, scratch)
