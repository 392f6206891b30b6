"""When to send a request again, and after how long: pure functions, the rules of the `openai` package.

408, 409, 429, 5xx and broken connections are tried again, unless `x-should-retry` says otherwise; 501 and 507 are not,
because they say that another try is of no use.
"""

from __future__ import annotations

import email.utils
import math
import time

import httpx

from .errors import APIConnectionError, APIError, LoraplexError

INITIAL_DELAY_S = 0.5
MAX_DELAY_S = 8.0
MAX_RETRY_AFTER_S = 120.0
"""A server that asks for a longer pause than this is not waited for: its error is raised."""


def retry_delay_s(failure: LoraplexError, *, retries_taken: int, max_retries: int, jitter: float) -> float | None:
    """Seconds to wait before the next try, or None if `failure` should be raised.

    `jitter` in [0, 1) shortens the back-off by up to a quarter, so that clients refused together come back apart.
    """
    if retries_taken >= max_retries or not _is_worth_retrying(failure):
        return None
    asked = retry_after_s(failure.headers) if isinstance(failure, APIError) else None
    if asked is not None and asked > MAX_RETRY_AFTER_S:
        return None
    if asked is not None and asked > 0:
        return asked
    return min(INITIAL_DELAY_S * 2.0 ** min(retries_taken, 30), MAX_DELAY_S) * (1 - 0.25 * jitter)


def retry_after_s(headers: httpx.Headers, *, now_s: float | None = None) -> float | None:
    """The pause the server asks for: `retry-after-ms`, or `retry-after` in seconds or as a date; None if neither."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            value = float(headers[name]) / per_second
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            return value
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    return date.timestamp() - (time.time() if now_s is None else now_s)


def _is_worth_retrying(failure: LoraplexError) -> bool:
    if isinstance(failure, APIConnectionError):
        return failure.transient
    if not isinstance(failure, APIError) or failure.status_code is None:
        return False
    told: str = failure.headers.get("x-should-retry", "")
    if told in ("true", "false"):
        return told == "true"
    status_code = failure.status_code
    return status_code in (408, 409, 429) or (status_code >= 500 and status_code not in (501, 507))
