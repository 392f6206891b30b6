"""Results as Markdown: one section a CSV file, with what was measured, where, and our ratio to each peer."""

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def decode_section(rows: Sequence[Row]) -> str:
    """Milliseconds of a decode step, its byte floor, and every peer's beside it."""
    first = rows[0]
    facts = [f"{word} {first[key]} GB" for word, key in _LOAD_FACTS if float(first.get(key) or 0)]
    if first.get("source") == "checkpoint" and first.get("load_s"):
        facts.insert(0, f"loaded from a checkpoint in {first['load_s']} s")
    head = (
        f"The engine alone on one {_of(first, 'device')}: a random base of shape {_of(first, 'shape')}, "
        f"{_of(first, 'quantization')}, adapters of rank {_ranks(first)}, sequence *i* on adapter *i* modulo their number"
        f"{'; ' if facts else ''}{', '.join(facts)}. One step makes one token of every sequence; its floor is the bytes it "
        f"must read over the device's copy rate. {versions(first, ('torch',))}."
    )
    modes = len(_distinct(rows, "mode")) > 1
    columns = ["batch", "adapters", *(["mode"] if modes else []), "ms/step, median", "p10", "p90", "floor", "tokens/s"]

    def cells(row: Row) -> list[str]:
        mode = [row["mode"]] if modes else []
        times = (row.get(f"ms_per_step_{key}", "") for key in ("median", "p10", "p90"))
        tokens = _number(row.get("output_tokens_per_s", ""), 0)
        return [row["batch"], row["adapters"], *mode, *map(_number, (*times, row.get("floor_ms", ""))), tokens]

    return f"{head}\n\n{_with_peers(rows, columns, cells, ('batch', 'adapters'), 'ms_per_step_median', 'ms')}"


def prefill_section(rows: Sequence[Row]) -> str:
    """Prompt tokens a second, and every peer's beside it."""
    first = rows[0]
    head = (
        f"Reading prompts on one {_of(first, 'device')}: a random base of shape {_of(first, 'shape')}, "
        f"{_of(first, 'quantization')}, adapters of rank {_ranks(first)}, all prompts submitted at once, steps of at most "
        f"{_of(first, 'max_batched_tokens')} tokens. {versions(first, ('torch',))}."
    )
    columns = ["prompts", "adapters", "tokens each", "tokens/s", "ms to the first token, median", "p90"]

    def cells(row: Row) -> list[str]:
        waits = (_number(row.get(f"first_token_ms_{key}", ""), 0) for key in ("median", "p90"))
        return [row["batch"], row["adapters"], row["prompt_tokens"], _number(row["prefill_tokens_per_s"], 0), *waits]

    keys = ("batch", "adapters", "prompt_tokens")
    return f"{head}\n\n{_with_peers(rows, columns, cells, keys, 'prefill_tokens_per_s', 'tokens/s')}"


def serve_section(rows: Sequence[Row]) -> str:
    """Throughput and latencies over HTTP, by level of load."""
    first = rows[0]
    head = (
        f"Over HTTP on one {_of(first, 'device')}: a random base of shape {_of(first, 'shape')}, "
        f"{_of(first, 'quantization')}, {_of(first, 'adapters')} adapters of rank {_ranks(first)}, "
        f"{_of(first, 'prompt_tokens')} prompt tokens and {_of(first, 'new_tokens')} answer tokens a request, streamed. "
        f"{versions(first, ('torch',))}."
    )
    level = "concurrency" if first.get("concurrency") else "rate"
    columns = ["requests at once" if level == "concurrency" else "requests/s offered", "tokens/s"]
    columns += ["first token ms, median", "p99", "between events ms, median", "p99"]

    def cells(row: Row) -> list[str]:
        latencies = (f"{name}_ms_{key}" for name in ("first_token", "inter_token") for key in ("p50", "p99"))
        return [row[level], _number(row["output_tokens_per_s"], 0), *(_number(row.get(key, "")) for key in latencies)]

    return f"{head}\n\n{_with_peers(rows, columns, cells, (level,), 'output_tokens_per_s', 'tokens/s')}"


def served_table(rows: Sequence[Row]) -> str:
    """Output tokens a second of every engine at every number of requests at once: medians over repeats, and ratios."""
    lines = []
    for concurrency, adapters in _distinct(rows, "concurrency", "adapters"):
        here = [row for row in rows if (row["concurrency"], row["adapters"]) == (concurrency, adapters)]
        medians = {
            engine: statistics.median(float(row["output_tokens_per_s"]) for row in here if row["engine"] == engine)
            for (engine,) in _distinct(here, "engine")
        }
        ours = max(rate for engine, rate in medians.items() if engine.startswith("loraplex"))
        for engine, rate in medians.items():
            ratio = "" if engine.startswith("loraplex") else f"{ours / rate:.2f}"
            lines.append([concurrency, adapters, engine, f"{rate:.1f}", ratio])
    return table(["requests at once", "adapters", "engine", "output tokens/s", "ours / this"], lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_LOAD_FACTS = (("weights", "weights_gb"), ("peak while loading", "load_peak_gb"))


def _with_peers(
    rows: Sequence[Row],
    columns: Sequence[str],
    cells: Callable[[Row], list[str]],
    keys: Sequence[str],
    value: str,
    unit: str,
) -> str:
    """Our rows as ``cells`` says them, with a column for each peer: its value and how many times as fast ours is."""
    ours = [row for row in rows if row.get("engine", "loraplex") == "loraplex"]
    names = [name for (name,) in _distinct(rows, "engine") if name != "loraplex"] if len(ours) < len(rows) else []
    lines = []
    for row in ours:
        line = cells(row)
        for name in names:
            same = [r for r in rows if r["engine"] == name and all(r[key] == row[key] for key in keys)]
            comparable = same and row.get("mode", "greedy") == "greedy"
            line.append(f"{_number(same[0][value], 1)} ({_number(same[0]['ratio'], 1)} x)" if comparable else "")
        lines.append(line)
    return table([*columns, *(f"{name}: {unit} (ours is faster by)" for name in names)], lines)


def _distinct(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    """The combinations of values that occur, in order of first appearance."""
    return list(dict.fromkeys(tuple(row.get(column, "") for column in columns) for row in rows))


def _of(row: Row, column: str) -> str:
    return row.get(column) or "unknown"


def _ranks(row: Row) -> str:
    return " and ".join((row.get("ranks") or row.get("rank") or "unknown").split())


def _number(text: str, digits: int = 2) -> str:
    return f"{float(text):,.{digits}f}" if text else ""


def versions(row: Row, packages: Sequence[str]) -> str:
    """The packages' versions and the commit of a measurement."""
    known = [f"{name} {row[name]}" for name in packages if row.get(name)]
    return ", ".join([*known, f"commit {_of(row, 'commit')}"])
