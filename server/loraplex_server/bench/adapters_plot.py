"""The picture of ``loraplex bench adapters``: loads by size, gaps between tokens, and the rate of requests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraplex_server.bench.plot import label_axes, new_figure, save

Row = dict[str, Any]

_COLORS = ("#2563eb", "#7c3aed", "#0891b2", "#f59e0b", "#dc2626")
_WHISKER = "#6b7280"


def adapters_plot(rows: Sequence[Row], path: Path) -> Path:
    """Three panels, one a part. Raises NoMatplotlib."""
    figure, (loads, streams, rates) = new_figure(width=5.2, panels=3)
    _loads(loads, [row for row in rows if row["part"] == "load"])
    _streams(streams, [row for row in rows if row["part"] == "stream"])
    _rates(rates, [row for row in rows if row["part"] == "rate"])
    first = rows[0]
    figure.suptitle(f"Adapters, {first['shape']}, {first.get('device', '')}", fontsize=10, x=0.01, ha="left")
    return save(figure, path)


def _loads(axes: Any, rows: Sequence[Row]) -> None:
    ranks = list(dict.fromkeys(row["rank"] for row in rows))
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    width = 0.82 / max(len(kinds), 1)
    for i, kind in enumerate(kinds):
        found = [row for row in rows if row["what"] == kind]
        at = [ranks.index(row["rank"]) + (i - (len(kinds) - 1) / 2) * width for row in found]
        _bars(axes, at, found, width * 0.94, _COLORS[i % len(_COLORS)], kind, upper="ms_p95")
    sizes = {row["rank"]: row["mb"] for row in rows}
    axes.set_xticks(range(len(ranks)), [f"rank {rank}\n{sizes[rank]} MB" for rank in ranks])
    axes.set_ylim(0, 1.4 * max((row["ms_p95"] for row in rows), default=1))
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)
    label_axes(axes, title="Loads, median (whisker: p95)", x_label="", y_label="milliseconds (lower is better)")


def _streams(axes: Any, rows: Sequence[Row]) -> None:
    _bars(axes, range(len(rows)), rows, 0.6, _COLORS[0], "p50", upper="ms_p99")
    axes.set_xticks(
        range(len(rows)), [row["what"].replace("streams ", "").replace(" again", "\nagain") for row in rows]
    )
    title = "Between two tokens, median (whisker: p99)"
    label_axes(axes, title=title, x_label="", y_label="milliseconds (lower is better)")


def _rates(axes: Any, rows: Sequence[Row]) -> None:
    axes.plot([row["registered"] for row in rows], [row["requests_per_s"] for row in rows], "o-", color=_COLORS[0])
    for row in rows:
        label = f"{row['ratio'] * 100:.0f} %"
        at = (row["registered"], row["requests_per_s"])
        axes.annotate(label, at, textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xticks([row["registered"] for row in rows], [f"{row['registered']:,}" for row in rows])
    axes.minorticks_off()
    axes.set_ylim(0, 1.2 * max((row["requests_per_s"] for row in rows), default=1))
    label_axes(axes, title="Requests, Zipf's law", x_label="registered adapters", y_label="requests a second")


def _bars(
    axes: Any, at: Sequence[float], rows: Sequence[Row], width: float, color: str, label: str, *, upper: str
) -> None:
    heights = [row["ms_p50"] for row in rows]
    whiskers = [[0.0] * len(rows), [max(0.0, row[upper] - row["ms_p50"]) for row in rows]]
    bars = axes.bar(at, heights, width, label=label, color=color, yerr=whiskers, ecolor=_WHISKER, capsize=2)
    axes.bar_label(bars, [f"{height:.2g}" for height in heights], padding=3, fontsize=7, color="#374151")
