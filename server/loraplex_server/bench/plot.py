"""Pictures of results, one PNG a measurement. matplotlib comes with the `bench` extra; without it there are none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NO_MATPLOTLIB = "no plot: matplotlib is not installed (pip install 'loraplex[bench]', or '.[bench]' in a checkout)"

_OURS = "#2563eb"
_SHADES = ("#2563eb", "#7c3aed", "#0891b2", "#0d9488")
_PEERS = ("#f59e0b", "#dc2626", "#65a30d", "#a16207")
_FLOOR = "#111827"
# Beyond this ratio the small bars of a linear axis cannot be read.
_LOG_RATIO = 12


class NoMatplotlib(Exception):
    """matplotlib is not installed."""


def decode_plot(rows: Sequence[Row], path: Path) -> Path:
    """Milliseconds a step by batch and adapters, the byte floor as a line, peers beside. Raises NoMatplotlib."""
    for row in rows:
        row["series"] = row["engine"] if row["engine"] != "loraplex" else f"loraplex, {row['mode']}"
    first = rows[0]
    title = f"One decode step, {first['shape']}, rank {first['ranks']}, {first['prompt_tokens']} prompt tokens"
    return _bars(
        rows,
        path,
        value="ms_per_step_median",
        low="ms_per_step_p10",
        high="ms_per_step_p90",
        floor="floor_ms",
        title=f"{title}\n{first.get('device', '')}",
        x_label="sequences / distinct adapters",
        y_label="milliseconds a step (lower is better)",
    )


def prefill_plot(rows: Sequence[Row], path: Path) -> Path:
    """Prompt tokens a second by batch and adapters. Raises NoMatplotlib."""
    for row in rows:
        row["series"] = f"{row['engine']}, {row['prompt_tokens']} tokens"
    first = rows[0]
    return _bars(
        rows,
        path,
        value="prefill_tokens_per_s",
        low="prefill_tokens_per_s_min",
        high="prefill_tokens_per_s_max",
        floor=None,
        title=f"Reading prompts, {first['shape']}, rank {first['ranks']}\n{first.get('device', '')}",
        x_label="prompts at once / distinct adapters",
        y_label="prompt tokens a second (higher is better)",
    )


def _bars(
    rows: Sequence[Row],
    path: Path,
    *,
    value: str,
    low: str,
    high: str,
    floor: str | None,
    title: str,
    x_label: str,
    y_label: str,
) -> Path:
    """Groups of bars: one group a case, one color a series, whiskers from ``low`` to ``high``."""
    cases = list(dict.fromkeys(f"{row['batch']}/{row['adapters']}" for row in rows))
    series = list(dict.fromkeys(row["series"] for row in rows))
    ours = [name for name in series if name.startswith("loraplex")]
    colors = dict(zip(ours, _SHADES * len(ours), strict=False))
    colors |= dict(zip((name for name in series if name not in colors), _PEERS * len(series), strict=False))
    figure, axes = new_figure(width=max(7.0, 1.5 + 0.34 * len(cases) * (len(series) + 1)))
    width = 0.82 / len(series)
    for i, name in enumerate(series):
        found = {f"{row['batch']}/{row['adapters']}": row for row in rows if row["series"] == name}
        at = [cases.index(case) + (i - (len(series) - 1) / 2) * width for case in found]
        heights = [row[value] for row in found.values()]
        whiskers = [
            [max(0.0, row[value] - row[low]) for row in found.values()],
            [max(0.0, row[high] - row[value]) for row in found.values()],
        ]
        bars = axes.bar(
            at, heights, width * 0.94, label=name, color=colors[name], yerr=whiskers, ecolor="#6b7280", capsize=2
        )
        axes.bar_label(bars, [_short(height) for height in heights], padding=3, fontsize=7, color="#374151")
    if floor is not None:
        floors = {f"{row['batch']}/{row['adapters']}": row[floor] for row in rows if row.get(floor)}
        for n, (case, least) in enumerate(floors.items()):
            middle = cases.index(case)
            label = "byte floor" if n == 0 else None
            axes.hlines(least, middle - 0.46, middle + 0.46, colors=_FLOOR, linestyles="--", linewidth=1.2, label=label)
    heights = [row[value] for row in rows]
    if max(heights) > _LOG_RATIO * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(top=max(heights) * 2.2)
        y_label += ", logarithmic"
    else:
        axes.set_ylim(0, max(heights) * 1.15)
    axes.set_xticks(range(len(cases)), cases)
    label_axes(axes, title=title, x_label=x_label, y_label=y_label)
    figure.legend(loc="outside lower center", ncols=min(len(series) + 1, 4), fontsize=8, frameon=False)
    return save(figure, path)


def new_figure(*, width: float = 8.0, height: float = 4.4, panels: int = 1) -> tuple[Any, Any]:
    """A light figure and its axes (an array for several panels). Raises NoMatplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlib(NO_MATPLOTLIB) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.style.context("default"):
        figure, axes = pyplot.subplots(
            1, panels, figsize=(width * panels, height), layout="constrained", facecolor="white"
        )
    return figure, axes


def label_axes(axes: Any, *, title: str, x_label: str, y_label: str) -> None:
    """Name the axes of one panel and draw its grid."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save(figure: Any, path: Path) -> Path:
    """Write the picture and let go of it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def serve_plot(rows: Sequence[Row], path: Path) -> Path:
    """Throughput, time to first token and time between tokens over the level of load. Raises NoMatplotlib."""
    figure, panels = new_figure(width=4.6, height=4.2, panels=3)
    level = "concurrency" if any(row["concurrency"] != "" for row in rows) else "rate"
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    ours = [name for name in engines if " + " not in name and not name.startswith("vllm")]
    colors = dict(zip(ours, _SHADES * len(ours), strict=False))
    colors |= dict(zip((name for name in engines if name not in colors), _PEERS * len(engines), strict=False))
    for name in engines:
        for key, style, what in _SERVE_LINES:
            known = [row for row in rows if row["engine"] == name and row[level] != "" and row.get(key, "") != ""]
            if known:
                panel = panels[0 if what == "" else 1 if key.startswith("first") else 2]
                xs, ys = [row[level] for row in known], [row[key] for row in known]
                panel.plot(xs, ys, style, marker="o", markersize=4, color=colors[name], label=f"{name} {what}".strip())
    x_label = "requests at once" if level == "concurrency" else "requests a second offered"
    first = rows[0]
    adapters = (
        f"{first['adapters']} models, mix {first['mix']}, {first['prompt_tokens']} + {first['new_tokens']} tokens"
    )
    titles = (
        (f"Served load: {adapters}\n{first.get('device', '')}", "output tokens a second (higher is better)"),
        ("Time to first token", "milliseconds (lower is better)"),
        ("Between one event and the next", "milliseconds (lower is better)"),
    )
    for panel, (title, y_label) in zip(panels, titles, strict=True):
        label_axes(panel, title=title, x_label=x_label, y_label=y_label)
        panel.set_ylim(bottom=0)
        panel.set_xticks(sorted({row[level] for row in rows if row[level] != ""}))
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7, frameon=False)
    return save(figure, path)


_SERVE_LINES = (
    ("output_tokens_per_s", "-", ""),
    ("first_token_ms_p50", "-", "p50"),
    ("first_token_ms_p99", "--", "p99"),
    ("inter_token_ms_p50", "-", "p50"),
    ("inter_token_ms_p99", "--", "p99"),
)
