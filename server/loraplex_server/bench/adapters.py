"""``loraplex bench adapters``: how long loads take, what they cost those who decode meanwhile, and how the rate of
requests holds when thousands of adapters are registered."""

import itertools
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loraplex_server.bench.decode import OnRow
from loraplex_server.bench.floor import adapter_bytes
from loraplex_server.bench.library import AdapterLibrary
from loraplex_server.bench.rig import CaseFailed, LoadedBase
from loraplex_server.engine.engine import Engine, EngineLimits
from loraplex_server.engine.messages import Abort, Command, StepReport, Submit, Warm
from loraplex_server.engine.sequence import Request, SamplingParams

Row = dict[str, Any]

_BLOCK_SIZE = 16
_SPARE_BYTES = 16 << 20
_POLL_S = 0.02
# Where the numbers begin of adapters that only push others off the device, that come in beside streams, and that requests
# are spread over.
_OTHERS, _BESIDE, _SPREAD = 10_000, 20_000, 30_000


@dataclass(frozen=True)
class AdaptersPlan:
    """``device_adapters`` of the largest rank have room on the device, ``host_adapters`` in host memory.

    Loads are timed for each of ``ranks``, ``num_loads`` times. ``num_streams`` decode for ``stream_s`` seconds while a new
    adapter comes every ``load_every_s``. Then ``concurrency`` requests at a time go to each number of ``registered``
    adapters of ``rate_rank``, chosen by Zipf's law with exponent ``zipf``, for half to one and a half times
    ``new_tokens``; the first and the last ``concurrency`` of them do not count.
    """

    ranks: tuple[int, ...] = (8, 16, 64)
    num_loads: int = 20
    num_streams: int = 8
    stream_s: float = 4.0
    load_every_s: float = 0.1
    registered: tuple[int, ...] = (5, 100, 1000, 2000)
    rate_rank: int = 8
    concurrency: int = 32
    num_requests: int = 400
    zipf: float = 1.0
    prompt_tokens: int = 128
    new_tokens: int = 64
    device_adapters: int = 32
    host_adapters: int = 128
    num_files: int = 16
    seed: int = 0

    @property
    def all_ranks(self) -> tuple[int, ...]:
        return tuple(sorted({*self.ranks, self.rate_rank}))

    def columns(self) -> Row:
        return {
            "prompt_tokens": self.prompt_tokens,
            "files": self.num_files,
            "device_adapters": self.device_adapters,
            "host_adapters": self.host_adapters,
            "seed": self.seed,
        }


def measure(base: LoadedBase, plan: AdaptersPlan, on_row: OnRow = lambda row: None) -> list[Row]:
    """All three parts on one engine."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-adapters-") as scratch:
        library = AdapterLibrary(Path(scratch), base, plan.all_ranks, num_files=plan.num_files, seed=plan.seed)
        with _Bench(base, plan, library) as bench:
            bench.settle()
            common = {**base.columns(), **plan.columns()}
            for row in itertools.chain(_loads(bench, plan), _streams(bench, plan), _rates(bench, plan)):
                rows.append({"engine": "loraplex", **row, **common})
                on_row(rows[-1])
    return rows


class _Bench:
    """An engine that sleeps as the server's does, and what it reported. A context manager."""

    def __init__(self, base: LoadedBase, plan: AdaptersPlan, library: AdapterLibrary) -> None:
        self.library = library
        self._plan = plan
        self._numbers = itertools.count()
        self._rng = random.Random(plan.seed)
        self._vocab_size = base.decoder.spec.vocab_size
        self._woken = threading.Event()
        spec, dtype = base.decoder.spec, base.decoder.dtype
        self._bytes = {rank: adapter_bytes(spec, dtype, rank) for rank in plan.all_ranks}
        largest = adapter_bytes(spec, dtype, -(-max(plan.all_ranks) // 8) * 8)
        self._device_bytes = plan.device_adapters * largest + _SPARE_BYTES
        max_tokens = plan.prompt_tokens + max(plan.new_tokens * 3 // 2, self.stream_tokens)
        max_running = max(plan.concurrency, plan.num_streams)
        limits = EngineLimits(
            max_model_len=max_tokens,
            kv_blocks=max_running * (max_tokens // _BLOCK_SIZE + 2) + 1,
            block_size=_BLOCK_SIZE,
            adapter_bytes=self._device_bytes,
            host_adapter_bytes=plan.host_adapters * largest + _SPARE_BYTES,
            max_running=max_running,
            max_batched_tokens=2048,
            prefix_cache=False,
        )
        self.engine = Engine(
            base.decoder, base.decoder.base_shape, library.open, limits, frozenset(), wake=self._woken.set
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.engine.close()

    @property
    def stream_tokens(self) -> int:
        """More than a stream decodes in the time it is watched."""
        return int(self._plan.stream_s * 1000)

    def megabytes(self, rank: int) -> float:
        return round(self._bytes[rank] / 1e6, 1)

    def request(self, name: str | None, new_tokens: int) -> Request:
        prompt = tuple(self._rng.randrange(self._vocab_size) for _ in range(self._plan.prompt_tokens))
        sampling = SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
        return Request(str(next(self._numbers)), prompt, sampling, name)

    def send(self, command: Command) -> None:
        """Give the engine a command, which wakes it."""
        self.engine.handle(command)
        self._woken.set()

    def step(self) -> StepReport:
        """One turn of the server's loop. Raises CaseFailed."""
        if not self.engine.has_work and self.engine.is_waiting:
            self._woken.wait(_POLL_S)
        self._woken.clear()
        report = self.engine.step()
        for output in report.outputs:
            if output.failure is not None:
                raise CaseFailed(output.failure.message)
        for done in report.done:
            if done.failure is not None:
                raise CaseFailed(done.failure.message)
        return report

    def run(self, request: Request) -> list[StepReport]:
        """One request to its end, alone."""
        self.send(Submit(request))
        reports = [self.step()]
        while self.engine.has_work or self.engine.is_waiting:
            reports.append(self.step())
        return reports

    def warm(self, name: str) -> None:
        self.send(Warm(next(self._numbers), name))

    def wait(self) -> None:
        """Until nobody waits for anything."""
        while self.engine.has_work or self.engine.is_waiting:
            self.step()

    def push_off(self, rank: int) -> None:
        """Bring in as many others as have room on the device."""
        for i in range(self._device_bytes // self._bytes[rank] + 1):
            self.warm(self.library.name(rank, _OTHERS + i))
        self.wait()

    def on_host(self, names: list[str]) -> list[str]:
        """Those of these adapters that are in host memory and not on the device."""
        stats = None
        while stats is None:
            stats = self.step().stats
        return [name for name in names if name in stats.adapters and stats.adapters[name].residency == "host"]

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.send(Abort(request_id))
        self.wait()

    def settle(self) -> None:
        """Have everything compiled and every thread started: requests for the base and two adapters."""
        for rank in self._plan.all_ranks:
            for i in range(2):
                self.run(self.request(self.library.name(rank, -1 - i), 4))
        self.run(self.request(None, 4))


# --- loads -----------------------------------------------------------------------------------------------------------


def _loads(bench: _Bench, plan: AdaptersPlan) -> Iterator[Row]:
    for rank in plan.ranks:
        names = [bench.library.name(rank, i) for i in range(plan.num_loads)]
        seconds: dict[str, list[float]] = {"disk to host": [], "host to device": []}
        first: dict[str, list[float]] = {}
        for name in names:
            first.setdefault("first token, from disk", []).append(_first_token(bench, name, seconds))
            first.setdefault("first token, resident", []).append(_first_token(bench, name, {}))
        bench.push_off(rank)
        for name in bench.on_host(names):
            first.setdefault("first token, from host", []).append(_first_token(bench, name, seconds))
        for what, values in (seconds | dict(sorted(first.items()))).items():
            if values:
                yield {"part": "load", "what": what, "rank": rank, "mb": bench.megabytes(rank), **_times(values)}


def _first_token(bench: _Bench, name: str, seconds: dict[str, list[float]]) -> float:
    """Seconds from submission to the first token, of a request that has no other; times of copies go to ``seconds``."""
    began = time.perf_counter()
    reports = bench.run(bench.request(name, 1))
    took = time.perf_counter() - began
    for load in (load for report in reports for load in report.loads):
        step = "disk to host" if load.step == "disk_to_host" else "host to device"
        seconds.setdefault(step, []).append(load.seconds)
    return took


def _times(seconds: list[float]) -> Row:
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "ms_p50": round(statistics.median(ordered) * 1e3, 3),
        "ms_p95": round(_quantile(ordered, 0.95) * 1e3, 3),
        "ms_p99": round(_quantile(ordered, 0.99) * 1e3, 3),
        "ms_max": round(ordered[-1] * 1e3, 3),
    }


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


# --- streams beside loads --------------------------------------------------------------------------------------------


def _streams(bench: _Bench, plan: AdaptersPlan) -> Iterator[Row]:
    rank = 16 if 16 in plan.ranks else plan.ranks[0]
    numbers = itertools.count(_BESIDE)
    alone = 0.0
    for what in ("streams alone", "streams beside loads", "streams alone again"):
        loading = what == "streams beside loads"
        gaps, num_loads = _watch(bench, plan, rank, numbers if loading else None)
        times = _times(gaps)
        alone = alone or times["ms_p99"]
        yield {
            "part": "stream",
            "what": what,
            "rank": rank,
            "mb": bench.megabytes(rank),
            "streams": plan.num_streams,
            "loads": num_loads,
            **times,
            "ratio": round(times["ms_p99"] / alone, 4),
        }


def _watch(bench: _Bench, plan: AdaptersPlan, rank: int, numbers: Iterator[int] | None) -> tuple[list[float], int]:
    """Seconds between tokens of streams on adapters of their own, and how many adapters came in meanwhile."""
    ids = []
    for i in range(plan.num_streams):
        request = bench.request(bench.library.name(rank, i), bench.stream_tokens)
        ids.append(request.id)
        bench.send(Submit(request))
    while bench.step().num_decode_tokens < plan.num_streams:
        pass
    gaps: list[float] = []
    num_loads = 0
    began = last = time.perf_counter()
    next_load = began
    while last - began < plan.stream_s:
        if numbers is not None and last >= next_load:
            next_load += plan.load_every_s
            bench.warm(bench.library.name(rank, next(numbers)))
        report = bench.step()
        now = time.perf_counter()
        num_loads += sum(load.step == "host_to_gpu" for load in report.loads)
        if report.num_decode_tokens:
            gaps.append(now - last)
            last = now
        if any(output.finish_reason for output in report.outputs):
            break  # faster than foreseen: what was seen is enough
    bench.abort(ids)
    return gaps[3:], num_loads


# --- the rate of requests --------------------------------------------------------------------------------------------


def _rates(bench: _Bench, plan: AdaptersPlan) -> Iterator[Row]:
    few = 0.0
    for registered in plan.registered:
        weights = [1 / (i + 1) ** plan.zipf for i in range(registered)]
        picks = random.Random(plan.seed).choices(range(registered), weights, k=plan.num_requests + 2 * plan.concurrency)
        names = [bench.library.name(plan.rate_rank, _SPREAD + i) for i in picks]
        rate, first, copies, num_used = _serve(bench, plan, names)
        few = few or rate
        yield {
            "part": "rate",
            "what": "requests",
            "rank": plan.rate_rank,
            "mb": bench.megabytes(plan.rate_rank),
            "registered": registered,
            "concurrency": plan.concurrency,
            "zipf": plan.zipf,
            "new_tokens": plan.new_tokens,
            "adapters_used": num_used,
            "loads": copies["host_to_gpu"],
            "loads_from_disk": copies["disk_to_host"],
            **_times(first),
            "requests_per_s": round(rate, 3),
            "ratio": round(rate / few, 4),
        }


def _serve(bench: _Bench, plan: AdaptersPlan, names: list[str]) -> tuple[float, list[float], Counter[str], int]:
    """Requests a second, their times to the first token, copies by kind, and adapters that were asked for."""
    submitted: dict[str, float] = {}
    first: list[float] = []
    copies: Counter[str] = Counter()
    waiting, lengths = iter(names), random.Random(plan.seed)
    num_done, began = 0, 0.0

    def submit() -> None:
        name = next(waiting, None)
        if name is not None:
            # Of different lengths, or all would start and end together and their prompts be read in one step.
            request = bench.request(name, lengths.randint((plan.new_tokens + 1) // 2, plan.new_tokens * 3 // 2))
            submitted[request.id] = time.perf_counter()
            bench.send(Submit(request))

    for _ in range(plan.concurrency):
        submit()
    ended = 0.0
    while num_done < len(names):
        report = bench.step()
        now = time.perf_counter()
        counts = began and not ended
        copies.update(load.step for load in report.loads if counts)
        for output in report.outputs:
            submitted_s = submitted.pop(output.request_id, None)
            if counts and submitted_s is not None:
                first.append(now - submitted_s)
            if output.finish_reason is not None:
                num_done += 1
                began = began or (now if num_done >= plan.concurrency else 0.0)
                ended = ended or (now if num_done >= len(names) - plan.concurrency else 0.0)
                submit()
    return plan.num_requests / (ended - began), first, copies, len(set(names))
