from __future__ import annotations

import httpx
import pytest

from loraplex_client.errors import APIConnectionError, APIError, LoraplexError, ResponseFormatError
from loraplex_client.retries import retry_after_s, retry_delay_s

from .drivers import Driver, Script, chat_answer, error_answer


def refused(status_code: int | None, **headers: str) -> APIError:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return APIError("no", status_code=status_code, headers=httpx.Headers(names))


def delay_s(failure: LoraplexError, retries_taken: int = 0, jitter: float = 0.0) -> float | None:
    return retry_delay_s(failure, retries_taken=retries_taken, max_retries=100, jitter=jitter)


@pytest.mark.parametrize("status_code", [408, 409, 429, 500, 502, 503, 504])
def test_passing_troubles_are_retried(status_code: int) -> None:
    assert delay_s(refused(status_code)) == 0.5


@pytest.mark.parametrize("status_code", [400, 401, 403, 404, 413, 422, 501, 507, None])
def test_lasting_troubles_are_not(status_code: int | None) -> None:
    assert delay_s(refused(status_code)) is None


def test_the_server_has_the_last_word() -> None:
    assert delay_s(refused(409, x_should_retry="false")) is None
    assert delay_s(refused(503, x_should_retry="false")) is None
    assert delay_s(refused(400, x_should_retry="true")) == 0.5


def test_broken_connections_are_retried_and_broken_answers_are_not() -> None:
    assert delay_s(APIConnectionError("refused")) == 0.5
    assert delay_s(APIConnectionError("not a URL", transient=False)) is None
    assert delay_s(ResponseFormatError("not JSON")) is None


def test_backoff_doubles_up_to_eight_seconds() -> None:
    assert [delay_s(refused(500), taken) for taken in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert delay_s(refused(500), 99) == 8.0


def test_jitter_takes_up_to_a_quarter() -> None:
    assert delay_s(refused(500), jitter=1.0) == pytest.approx(0.375)


def test_retries_end() -> None:
    assert retry_delay_s(refused(500), retries_taken=2, max_retries=2, jitter=0.0) is None


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry_after": "3"}, 3.0),
        ({"retry_after": "1.5"}, 1.5),
        ({"retry_after_ms": "250", "retry_after": "3"}, 0.25),
        ({"retry_after": "120"}, 120.0),
        ({"retry_after": "121"}, None),
        ({"retry_after": "0"}, 0.5),
        ({"retry_after": "-1"}, 0.5),
        ({"retry_after": "nan"}, 0.5),
        ({"retry_after": "soon"}, 0.5),
    ],
)
def test_the_pause_the_server_asks_for(headers: dict[str, str], expected: float | None) -> None:
    assert delay_s(refused(429, **headers)) == expected


def test_retry_after_as_a_date() -> None:
    headers = httpx.Headers({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"})
    assert retry_after_s(headers, now_s=90.0) == 10.0


def test_client_tries_three_times_and_raises_the_last_error(driver: Driver) -> None:
    script = Script(error_answer(500), error_answer(502), error_answer(503))
    with pytest.raises(APIError) as caught:
        driver.call(script, "chat", "hello", model="base")
    assert caught.value.status_code == 503
    assert len(script.requests) == 3
    first, second = driver.pauses_s
    assert 0.375 <= first <= 0.5
    assert 0.75 <= second <= 1.0


def test_client_waits_as_told_and_sends_the_same_again(driver: Driver) -> None:
    busy = error_answer(429, {"retry-after": "7"})
    script = Script(busy, httpx.Response(200, json=chat_answer("at last")))
    assert driver.call(script, "chat", "hello", model="base").text == "at last"
    assert driver.pauses_s == [7.0]
    assert script.bodies[0] == script.bodies[1]


def test_client_retries_connection_errors(driver: Driver) -> None:
    script = Script(httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.Response(200, json=chat_answer()))
    assert driver.call(script, "chat", "hello", model="base").text == "hi"
    assert len(driver.pauses_s) == 2


def test_a_taken_adapter_name_is_not_retried(driver: Driver) -> None:
    script = Script(error_answer(409, {"x-should-retry": "false"}, code="adapter_name_taken"))
    with pytest.raises(APIError, match="no"):
        driver.call(script, "adapters.load", "hf://a/b", name="pirate")
    assert len(script.requests) == 1
    assert driver.pauses_s == []


@pytest.mark.parametrize("probe", ["health", "ready"])
def test_probes_ask_once(driver: Driver, probe: str) -> None:
    script = Script(httpx.Response(503))
    assert driver.call(script, probe) is False
    assert len(script.requests) == 1
