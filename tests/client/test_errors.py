from __future__ import annotations

import httpx
import pytest

import loraplex_client
from loraplex_client import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InsufficientStorageError,
    LoraplexError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    TooLargeError,
    UnprocessableError,
)
from loraplex_client.errors import error_from_response

from .drivers import Driver, Script


@pytest.mark.parametrize(
    ("status_code", "expected"),
    [
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (409, ConflictError),
        (413, TooLargeError),
        (418, APIError),
        (422, UnprocessableError),
        (429, RateLimitError),
        (500, ServerError),
        (503, ServerError),
        (507, InsufficientStorageError),
    ],
)
def test_each_status_has_its_exception(driver: Driver, status_code: int, expected: type[APIError]) -> None:
    body = {"error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "gone"}}
    script = Script(
        httpx.Response(status_code, json=body, headers={"x-request-id": "req-1", "x-should-retry": "false"})
    )
    with pytest.raises(APIError) as caught:
        driver.call(script, "chat", "hello", model="base")
    error = caught.value
    assert type(error) is expected
    assert str(error) == f"no such model (HTTP {status_code})"
    fields = (error.status_code, error.message, error.type, error.param, error.code, error.request_id)
    assert fields == (status_code, "no such model", "invalid_request_error", "model", "gone", "req-1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Bad gateway</html>\nmore", "<html>Bad gateway</html>"),
        (b"", "Bad Gateway"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": "flat"}', "flat"),
        (b'{"error": {"code": 7}}', '{"error": {"code": 7}}'),
        (b"[1, 2]", "[1, 2]"),
        (b"\xff\xfe", "��"),
    ],
)
def test_any_body_becomes_a_message(content: bytes, message: str) -> None:
    error = error_from_response(httpx.Response(502, content=content))
    assert isinstance(error, ServerError)
    assert error.message == message


def test_nothing_listens(driver: Driver) -> None:
    script = Script(httpx.ConnectError("connection refused"))
    with pytest.raises(APIConnectionError, match=r"http://loraplex\.test:8000: connection refused") as caught:
        driver.call(script, "version")
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


def test_a_slow_server_is_a_timeout(driver: Driver) -> None:
    with pytest.raises(APITimeoutError, match="did not answer in time"):
        driver.call(Script(httpx.ReadTimeout("slow")), "version")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "http://host:port"])
def test_a_wrong_base_url_is_a_connection_error_without_retries(url: str) -> None:
    with (
        loraplex_client.Loraplex(url, sleep=lambda _: pytest.fail("retried")) as client,
        pytest.raises(APIConnectionError),
    ):
        client.version()


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it() -> None:
    for key in ("se\ncret", "sécret"):
        with loraplex_client.Loraplex(api_key=key) as client, pytest.raises(APIConnectionError, match="key") as caught:
            client.version()
        assert "cret" not in str(caught.value)


def test_one_root_for_all() -> None:
    exceptions = [
        value
        for name in loraplex_client.__all__
        if isinstance(value := getattr(loraplex_client, name), type) and issubclass(value, Exception)
    ]
    assert len(exceptions) == 16
    assert all(issubclass(exception, LoraplexError) for exception in exceptions)
