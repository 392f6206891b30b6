"""The README's measured section, written from the CSV files in benchmarks/results/. Files that are absent are left out.

python -m benchmarks.report
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import RESULTS
from loraplex_server.bench.report import (
    Row,
    decode_section,
    prefill_section,
    read,
    serve_section,
    served_table,
    versions,
)

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
NOTHING = "Nothing has been measured on this version yet."

_SECTIONS: tuple[tuple[str, Callable[[Sequence[Row]], str]], ...] = (
    ("decode", decode_section),
    ("prefill", prefill_section),
    ("serve", serve_section),
)


def with_measurements(readme: str, results: Path = RESULTS) -> str:
    """``readme`` with the section between its markers written anew."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the README lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{report(results)}\n\n{END}{after}"


def report(results: Path) -> str:
    """All tables, as Markdown."""
    sections = []
    for command, section in _SECTIONS:
        for path in sorted(results.glob(f"{command}_*.csv")):
            if "by_model" not in path.name:
                picture = path.with_suffix(".png")
                shown = f", [plot](benchmarks/results/{picture.name})" if picture.is_file() else ""
                source = f"Source: `benchmarks/results/{path.name}`, `loraplex bench {command}`{shown}."
                sections.append(f"{section(read(path))}\n\n{source}")
    sections += _serving_cpu(read(results / "serving_cpu.csv"))
    return "\n\n".join(sections) or NOTHING


def _serving_cpu(rows: Sequence[Row]) -> list[str]:
    """Ours beside transformers + peft on one CPU; nothing without rows."""
    if not rows:
        return []
    first = rows[0]
    repeats = len({row.get("repeat") for row in rows})
    head = (
        f"One CPU, {first.get('device') or 'unknown'}: a base of Qwen2.5-0.5B's shape with random weights, adapters of "
        f"rank 16, {first['prompt_tokens']} prompt tokens and {first['new_tokens']} answer tokens a request, the same for "
        f"both, in turn. Medians of {repeats} runs. The peer runs on NF4 weights, as ours does, and on plain ones. "
        f"{versions(first, ('torch', 'transformers', 'peft', 'bitsandbytes'))}."
    )
    return [head, served_table(rows), "Source: `benchmarks/results/serving_cpu.csv`, `make bench`."]


if __name__ == "__main__":
    README.write_text(with_measurements(README.read_text(encoding="utf-8")), encoding="utf-8")
