"""What a run says: percentiles, rates, errors by code, goodput; of all requests and of each model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .plan import LoadPlan, Slo
from .result import LoadResult, RequestRecord


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds; ``None`` where nothing was observed."""

    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    mean: float | None
    most: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        if not seconds:
            return cls(None, None, None, None, None, None)
        ordered = sorted(seconds)
        p50, p90, p95, p99 = (percentile(ordered, q) * 1e3 for q in (50, 90, 95, 99))
        return cls(p50, p90, p95, p99, sum(ordered) / len(ordered) * 1e3, ordered[-1] * 1e3)


def percentile(ordered: Sequence[float], q: float) -> float:
    """The ``q``-th percentile of sorted values, by linear interpolation between the two next to it."""
    if not ordered:
        raise ValueError("no values")
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class LoadSummary:
    """One run, or one model's part of it.

    Latencies are those of requests that went well, from when they were due. ``seconds``: from the start to the plan's
    duration if it has one, else to the last token. Rates count what ended, and tokens that came, within that time.
    ``inter_token``: between one event and the next; ``per_token``: a request's mean after its first token.
    ``goodput``: requests a second within the SLO. ``late``: how long after it was due a request was really sent.
    """

    num_requests: int
    num_ok: int
    errors: Mapping[str, int]
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    input_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    num_events: int
    first_token: Percentiles
    inter_token: Percentiles
    per_token: Percentiles
    request: Percentiles
    late: Percentiles
    goodput: float | None = None
    within_slo: float | None = None
    by_model: Mapping[str, LoadSummary] = field(default_factory=dict)


def summarize(plan: LoadPlan, result: LoadResult, slo: Slo | None = None) -> LoadSummary:
    """The whole run, with each model's part in ``by_model``."""
    records = result.records
    ends = [record.end_s for record in records]
    end_s = max(ends, default=result.start_s)
    if plan.duration_s is not None:
        end_s = min(end_s, result.start_s + plan.duration_s)
    window = (result.start_s, end_s)
    models = sorted({record.model for record in records})
    parts = {model: _summary([r for r in records if r.model == model], window, slo) for model in models}
    return _summary(records, window, slo, parts)


def _summary(
    records: Sequence[RequestRecord],
    window: tuple[float, float],
    slo: Slo | None,
    by_model: Mapping[str, LoadSummary] | None = None,
) -> LoadSummary:
    seconds = max(window[1] - window[0], 1e-9)
    ok = [record for record in records if record.ok]
    ended = [record for record in ok if record.end_s <= window[1] + 1e-9]
    good = [record for record in ended if _is_good(record, slo)] if slo else None
    return LoadSummary(
        num_requests=len(records),
        num_ok=len(ok),
        errors=dict(Counter(record.error for record in records if not record.ok).most_common()),
        seconds=seconds,
        requests_per_s=len(ended) / seconds,
        output_tokens_per_s=sum(_tokens_within(record, window[1]) for record in records) / seconds,
        input_tokens_per_s=sum(r.prompt_tokens for r in ok if r.event_s and r.event_s[0] <= window[1]) / seconds,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        output_tokens=sum(record.output_tokens for record in records),
        num_events=sum(len(record.event_s) for record in records),
        first_token=Percentiles.of([record.first_token_s for record in ok if record.first_token_s is not None]),
        inter_token=Percentiles.of([gap for record in ok for gap in record.gaps_s]),
        per_token=Percentiles.of([record.per_token_s for record in ok if record.per_token_s is not None]),
        request=Percentiles.of([record.request_s for record in ok]),
        late=Percentiles.of([record.sent_s - record.due_s for record in records]),
        goodput=None if good is None else len(good) / seconds,
        within_slo=None if good is None else len(good) / max(len(records), 1),
        by_model=by_model or {},
    )


def _tokens_within(record: RequestRecord, end_s: float) -> float:
    """Tokens that came until then; those of one request spread evenly over its events."""
    events = len(record.event_s)
    if not events or record.event_s[-1] <= end_s:
        return record.output_tokens
    return record.output_tokens * sum(at <= end_s for at in record.event_s) / events


def _is_good(record: RequestRecord, slo: Slo) -> bool:
    """Within every limit; an answer without a second token has no time per token to judge."""
    observed = (
        (record.first_token_s, slo.first_token_ms),
        (record.per_token_s, slo.per_token_ms),
        (record.request_s, slo.request_ms),
    )
    return all(limit is None or seconds is None or seconds * 1e3 <= limit for seconds, limit in observed)
