"""The README's measured section, written from the CSV files in benchmarks/results/. Files that are absent are left out.

python -m benchmarks.report
"""

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
NOTHING = "Nothing has been measured on this version yet."

Row = dict[str, str]


def with_measurements(readme: str, results: Path = RESULTS) -> str:
    """``readme`` with the section between its markers written anew."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the README lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{report(results)}\n\n{END}{after}"


def report(results: Path) -> str:
    """All tables, as Markdown."""
    sections = [serving_cpu(read(results / "serving_cpu.csv"))]
    sections += [
        engine(path.name, read(path)) for path in sorted([*results.glob("engine*.csv"), *results.glob("decode*.csv")])
    ]
    return "\n\n".join(section for section in sections if section) or NOTHING


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def serving_cpu(rows: Sequence[Row]) -> str:
    """Ours beside transformers + peft on one CPU: medians over the repeats, and our ratio to each peer."""
    if not rows:
        return ""
    table = []
    for concurrency, adapters in _distinct(rows, "concurrency", "adapters"):
        here = [row for row in rows if (row["concurrency"], row["adapters"]) == (concurrency, adapters)]
        medians = {
            engine: statistics.median(float(row["output_tokens_per_s"]) for row in here if row["engine"] == engine)
            for (engine,) in _distinct(here, "engine")
        }
        ours = max(rate for engine, rate in medians.items() if engine.startswith("loraplex"))
        for engine, rate in medians.items():
            ratio = "" if engine.startswith("loraplex") else f"{ours / rate:.2f}"
            table.append([concurrency, adapters, engine, f"{rate:.1f}", ratio])
    first, packages = rows[0], ("torch", "transformers", "peft", "bitsandbytes")
    repeats = len({row["repeat"] for row in rows})
    head = (
        f"One CPU, {_of(first, 'device')}: a base of Qwen2.5-0.5B's shape with random weights, adapters of rank 16, "
        f"{_of(first, 'prompt_tokens')} prompt tokens and {_of(first, 'new_tokens')} answer tokens a request, the same for "
        f"both, in turn. Medians of {repeats} runs. The peer runs on NF4 weights, as ours does, and on plain ones. "
        f"{_versions(first, packages)}."
    )
    columns = ["requests at once", "adapters", "engine", "output tokens/s", "ours / this"]
    return f"{head}\n\n{_table(columns, table)}\n\nSource: `benchmarks/results/serving_cpu.csv`, `make bench`."


def engine(name: str, rows: Sequence[Row]) -> str:
    """Milliseconds of one decode step by batch and adapters, and what loading took, from the file of this name."""
    if not rows:
        return ""
    first = rows[0]
    facts = [f"{word} {first[key]} {unit}" for word, key, unit in _LOAD_FACTS if float(first.get(key) or 0)]
    if first.get("source") == "checkpoint" and first.get("load_s"):
        facts.insert(0, f"loaded from a checkpoint in {first['load_s']} s")
    head = (
        f"The engine alone on one {_of(first, 'device')}: a random base of shape {_of(first, 'shape')}, "
        f"{_of(first, 'quantization')}, rank-{_of(first, 'rank')} adapters, sequence *i* on adapter *i* modulo their number"
        f"{'; ' if facts else ''}{', '.join(facts)}. One step makes one token of every sequence. "
        f"{_versions(first, ('torch',))}."
    )
    table = [
        [
            row["batch"],
            row["adapters"],
            *(_number(row.get(f"ms_per_step_{key}", "")) for key in ("median", "p10", "p90")),
        ]
        for row in rows
    ]
    columns = ["batch", "adapters", "ms/step, median", "10th percentile", "90th percentile"]
    return f"{head}\n\n{_table(columns, table)}\n\nSource: `benchmarks/results/{name}`, `loraplex bench decode`."


_LOAD_FACTS = (
    ("weights", "weights_gb", "GB"),
    ("peak while loading", "load_peak_gb", "GB"),
)


def _distinct(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    """The combinations of values that occur, in order of first appearance."""
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in rows))


def _of(row: Row, column: str) -> str:
    return row.get(column) or "unknown"


def _number(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


def _versions(row: Row, packages: Sequence[str]) -> str:
    known = [f"{name} {row[name]}" for name in packages if row.get(name)]
    return ", ".join([*known, f"commit {_of(row, 'commit')}"])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    README.write_text(with_measurements(README.read_text(encoding="utf-8")), encoding="utf-8")
