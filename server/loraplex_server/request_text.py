"""The metrics of requests in Prometheus' text format, written directly.

With fifty adapters these are five thousand lines. Through the library's objects they take fifty milliseconds, ten of them
on the event loop; from a copy of the counts five, and the copy one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loraplex_server.histogram import Histogram
from loraplex_server.observer import Mode
from loraplex_server.request_series import RequestSeries

_HISTOGRAMS: dict[str, tuple[str, Callable[[RequestSeries], Histogram]]] = {
    "loraplex_time_to_first_token_seconds": (
        "From submission to the first token.",
        lambda series: series.first_token,
    ),
    "loraplex_inter_token_seconds": (
        "Between one token and the next of the same answer.",
        lambda series: series.inter_token,
    ),
    "loraplex_request_seconds": ("From submission to the end of a whole answer.", lambda series: series.request),
    "loraplex_queue_seconds": (
        "From submission to the first step a request takes part in.",
        lambda series: series.queue,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[RequestSeries], int]]] = {
    "loraplex_prompt_tokens_total": ("Tokens of prompts.", lambda series: series.prompt_tokens),
    "loraplex_output_tokens_total": ("Tokens of answers.", lambda series: series.output_tokens),
}
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(frozen=True)
class RequestText:
    """The counts of each adapter and mode at one moment; ``text`` may run on any thread."""

    series: Sequence[tuple[str, Mode, RequestSeries]]

    @classmethod
    def of(cls, series: Iterable[tuple[str, Mode, RequestSeries]]) -> "RequestText":
        """Copies what it is given."""
        return cls([(adapter, mode, counts.copy()) for adapter, mode, counts in series])

    def text(self) -> str:
        """One family after the other."""
        labeled = [
            (f'adapter="{adapter.translate(_ESCAPES)}",mode="{mode}"', series) for adapter, mode, series in self.series
        ]
        lines: list[str] = []
        for name, (about, histogram_of) in _HISTOGRAMS.items():
            lines.append(f"# HELP {name} {about}\n# TYPE {name} histogram\n")
            for labels, series in labeled:
                _write_histogram(lines, name, labels, histogram_of(series))
        name = "loraplex_requests_total"
        lines.append(f"# HELP {name} Requests that ended, by how they ended.\n# TYPE {name} counter\n")
        for labels, series in labeled:
            lines += [f'{name}{{{labels},outcome="{outcome}"}} {n}.0\n' for outcome, n in series.outcomes.items()]
        for name, (about, count_of) in _COUNTERS.items():
            lines.append(f"# HELP {name} {about}\n# TYPE {name} counter\n")
            lines += [f"{name}{{{labels}}} {count_of(series)}.0\n" for labels, series in labeled]
        return "".join(lines)


def _write_histogram(lines: list[str], name: str, labels: str, histogram: Histogram) -> None:
    start = f'{name}_bucket{{{labels},le="'
    lines += [f'{start}{bound}"}} {count}\n' for bound, count in histogram.cumulative()]
    lines.append(f"{name}_count{{{labels}}} {histogram.count}.0\n{name}_sum{{{labels}}} {histogram.total!r}\n")
