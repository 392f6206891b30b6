"""``loraplex bench serve``: a load over HTTP, at several levels, on our own server or anybody's; latencies as users have them."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loraplex_client.load import LoadPlan, LoadSummary, Percentiles, Slo, run_load, summarize
from loraplex_client.load import Progress as Standing
from loraplex_server.bench import plot
from loraplex_server.bench.cases import Case, Load
from loraplex_server.bench.output import Column, Output, Row
from loraplex_server.bench.own_server import own_server
from loraplex_server.bench.peers import Peer, PeerSize, PeerUnavailable, open_peer
from loraplex_server.bench.record import circumstances, write_csv
from loraplex_server.bench.rig import BaseChoice

COLUMNS = (
    Column("engine", "engine"),
    Column("at once", "concurrency"),
    Column("rate", "rate", 1),
    Column("ok", "ok"),
    Column("errors", "errors"),
    Column("requests/s", "requests_per_s"),
    Column("tokens/s", "output_tokens_per_s", 1),
    Column("first token ms p50", "first_token_ms_p50", 1),
    Column("p99", "first_token_ms_p99", 1),
    Column("inter-token ms p50", "inter_token_ms_p50"),
    Column("p99", "inter_token_ms_p99"),
    Column("request ms p50", "request_ms_p50", 0),
    Column("p99", "request_ms_p99", 0),
    Column("goodput/s", "goodput"),
    Column("ours is faster by", "ratio"),
)

_BY_MODEL = (
    Column("model", "model"),
    *(column for column in COLUMNS if column.key not in ("engine", "goodput", "ratio")),
)
# More models than this are for the file alone.
_MOST_SHOWN = 16


@dataclass(frozen=True)
class Level:
    """One load: so many streams, or so many requests a second; how many requests in all, if time does not end it, and
    how many before."""

    concurrency: int | None = None
    rate: float | None = None
    num_requests: int | None = None
    warmup: int = 0

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.concurrency else f"{self.rate:g} a second"

    def of(self, load: LoadPlan, url: str) -> LoadPlan:
        """The load at this level."""
        return replace(
            load,
            url=url,
            concurrency=self.concurrency,
            rate=self.rate,
            num_requests=self.num_requests,
            warmup=self.warmup,
        )


@dataclass(frozen=True)
class ServePlan:
    """``load`` is measured at each of ``levels``; its own level, address and models stand for nothing.

    ``name``: of the files; ``engine``: what rows call the server.
    """

    load: LoadPlan
    levels: tuple[Level, ...]
    slo: Slo
    name: str
    engine: str


class NoSuchServer(Exception):
    """Nobody answers at the address, or not as a server of this API; the message says what happened."""


def run_against(plan: ServePlan, models: Sequence[str], out: Path) -> Output:
    """Against a server that runs already. ``models`` empty: all that it lists. Raises NoSuchServer."""
    url = plan.load.url
    names = tuple(models) or listed_models(url, plan.load.api_key)
    output = Output(out, plan.name, COLUMNS)
    output.note(f"{url}: {len(names)} models, {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}")
    _run_levels(replace(plan, load=replace(plan.load, models=names)), url, {}, output)
    return output


def run_own(
    plan: ServePlan,
    choice: BaseChoice,
    ranks: Sequence[int],
    flags: Sequence[str],
    peer_names: Sequence[str],
    out: Path,
) -> Output:
    """On a server started for the run; afterwards the peers, at the levels of a closed loop."""
    output = Output(out, plan.name, COLUMNS)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        output.note(f"starting a server: {choice.name}, {choice.quantization}, {len(ranks)} adapters ...")
        with own_server(choice, ranks, flags, Path(scratch)) as server:
            output.note(f"ready after {server.start_s:.1f} s at {server.url}")
            models = server.adapters or (server.base,)
            common = {
                "shape": choice.name,
                "quantization": choice.quantization,
                "ranks": " ".join(map(str, dict.fromkeys(ranks))),
                "start_s": round(server.start_s, 2),
            }
            _run_levels(replace(plan, load=replace(plan.load, models=models)), server.url, common, output)
        size = PeerSize(
            choice,
            tuple(ranks),
            max(level.concurrency or 1 for level in plan.levels),
            _longest(plan.load),
            Path(scratch),
        )
        for name in peer_names:
            _run_peer(name, size, plan, output)
    return output


def listed_models(url: str, api_key: str | None) -> tuple[str, ...]:
    """Every model that a server names. Raises NoSuchServer."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    try:
        reply = httpx.get(address, headers=headers, timeout=30)
        reply.raise_for_status()
        names = tuple(str(card["id"]) for card in reply.json()["data"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise NoSuchServer(f"{address} does not list its models: {error}") from error
    if not names:
        raise NoSuchServer(f"{address} lists no model; name one with --models")
    return names


def _run_levels(plan: ServePlan, url: str, common: Mapping[str, object], output: Output) -> None:
    by_model: list[Row] = []
    for level in plan.levels:
        load = level.of(plan.load, url)
        with _progress(level, load, output) as show:
            summary = summarize(load, run_load(load, show), plan.slo or None)
        output.add({"engine": plan.engine, **_columns(level, load), **columns_of(summary), **common})
        by_model += [
            {"model": model, **_columns(level, load), **columns_of(part)} for model, part in summary.by_model.items()
        ]
    if len(plan.load.models) > 1:
        if len(plan.load.models) <= _MOST_SHOWN:
            output.show_table(_BY_MODEL, by_model)
        path = output.folder / f"{plan.name}_by_model.csv"
        where = circumstances(("loraplex",))
        write_csv(path, [row | where for row in by_model])
        output.note(f"wrote {path}")
    output_plot(output)


def output_plot(output: Output) -> None:
    """Write what is there so far; once more when the peers are done."""
    output.finish(plot.serve_plot)


def _columns(level: Level, load: LoadPlan) -> Row:
    return {
        "concurrency": level.concurrency or "",
        "rate": level.rate or "",
        "adapters": len(load.models),
        "mix": load.mix.text,
        "prompt_tokens": load.prompt_tokens.text,
        "new_tokens": load.output_tokens.text,
        "endpoint": load.endpoint,
        "seed": load.seed,
    }


def columns_of(summary: LoadSummary) -> Row:
    """One summary as columns."""
    row: Row = {
        "requests": summary.num_requests,
        "ok": summary.num_ok,
        "errors": " ".join(f"{code}:{number}" for code, number in summary.errors.items()),
        "seconds": round(summary.seconds, 3),
        "requests_per_s": round(summary.requests_per_s, 3),
        "output_tokens_per_s": round(summary.output_tokens_per_s, 2),
        "input_tokens_per_s": round(summary.input_tokens_per_s, 2),
        "events": summary.num_events,
        "output_tokens": summary.output_tokens,
    }
    for name in ("first_token", "inter_token", "per_token", "request"):
        found: Percentiles = getattr(summary, name)
        for key in ("p50", "p90", "p95", "p99", "mean"):
            row[f"{name}_ms_{key}"] = _rounded(getattr(found, key))
    row["late_ms_p99"] = _rounded(summary.late.p99)
    row["goodput"] = _rounded(summary.goodput)
    row["within_slo"] = _rounded(summary.within_slo)
    return row


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 3)


def _longest(load: LoadPlan) -> int:
    return load.prompt_tokens.longest + load.output_tokens.longest


def _run_peer(name: str, size: PeerSize, plan: ServePlan, output: Output) -> None:
    try:
        peer = open_peer(name, size)
    except PeerUnavailable as error:
        output.note(f"{name} is left out: {error}")
        return
    try:
        for level in plan.levels:
            if level.concurrency is None:
                output.note(f"{name} is left out at {level}: it takes batches, not arrivals")
                continue
            output.add(_peer_row(peer, size, level.of(plan.load, plan.load.url), level.concurrency, output.rows))
    finally:
        peer.close()
    output_plot(output)


def _peer_row(peer: Peer, size: PeerSize, load: LoadPlan, concurrency: int, rows: Sequence[Row]) -> Row:
    """Whole batches of this size, one after the other, as many as the load would be."""
    case = Case(concurrency, min(concurrency, len(size.ranks)))
    prompt, new = load.prompt_tokens.typical, load.output_tokens.typical
    peer.seconds(Load(case, prompt, 2, load.seed))
    seconds, batches = 0.0, 0
    while True:
        seconds += peer.seconds(Load(case, prompt, new, load.seed + batches))
        batches += 1
        if load.duration_s is not None and seconds >= load.duration_s:
            break
        if load.num_requests is not None and batches * concurrency >= load.num_requests:
            break
    rate = batches * concurrency * new / seconds
    ours = [row for row in rows if row["engine"] == "loraplex" and row["concurrency"] == concurrency]
    return {
        "engine": peer.name,
        **_columns(Level(concurrency), load),
        "adapters": max(1, len(size.ranks)),
        "ok": batches * concurrency,
        "seconds": round(seconds, 3),
        "requests_per_s": round(batches * concurrency / seconds, 3),
        "output_tokens_per_s": round(rate, 2),
        "ratio": round(ours[0]["output_tokens_per_s"] / rate, 2) if ours else "",
        "shape": size.base.name,
    }


@contextmanager
def _progress(level: Level, load: LoadPlan, output: Output) -> Iterator[Any]:
    """A bar on a terminal; nothing elsewhere."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}{task.fields[of]} requests"),
        TextColumn("{task.fields[standing]}"),
        TimeElapsedColumn(),
        console=output.console,
        transient=True,
        disable=not output.console.is_terminal,
    )
    of = f" of {load.num_requests}" if load.num_requests else ""
    task = bar.add_task(str(level), total=load.num_requests, of=of, standing="")

    def show(now: Standing) -> None:
        seconds = bar.tasks[0].elapsed or 1e-9
        standing = f"{now.running} running, {now.output_tokens / seconds:,.0f} tokens/s, {now.errors} errors"
        bar.update(task, completed=now.ended, standing=standing)

    with bar:
        yield show
