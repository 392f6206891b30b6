"""Every exception the client raises, in one tree that mirrors the `openai` package's names.

LoraplexError
├── LocalAdapterError           the adapter to upload is not usable; nothing was sent
├── ResponseFormatError         the server's answer is not what the API promises
├── APIConnectionError          no answer, or an answer cut short
│   └── APITimeoutError
└── APIError                    the server answered with an error
    ├── BadRequestError         400
    ├── AuthenticationError     401
    ├── PermissionDeniedError   403
    ├── NotFoundError           404
    ├── ConflictError           409
    ├── TooLargeError           413
    ├── UnprocessableError      422
    ├── RateLimitError          429
    └── ServerError             5xx
        └── InsufficientStorageError  507
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx


class LoraplexError(Exception):
    """The root of everything this client raises on purpose."""


class LocalAdapterError(LoraplexError, ValueError):
    """The path given to `adapters.upload` is missing or holds no adapter; nothing was sent."""


class ResponseFormatError(LoraplexError):
    """The server's answer could not be read: not JSON, not an event stream, or fields of the wrong type."""


class APIConnectionError(LoraplexError):
    """The server could not be reached, or the connection broke before the answer was complete.

    `transient` is False where the same request can only fail again (a URL without a scheme, for example).
    """

    def __init__(self, message: str, *, transient: bool = True) -> None:
        super().__init__(message)
        self.transient = transient


class APITimeoutError(APIConnectionError):
    """The server did not answer within the client's timeout."""


class APIError(LoraplexError):
    """The server answered with an OpenAI error body.

    `status_code` is the HTTP status, or None for an error that arrived inside a stream, after the 200.
    `message`, `type`, `param` and `code` are the body's fields; `request_id` is the `x-request-id` header.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        request_id: str | None = None,
        headers: httpx.Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status_code = status_code
        self.type = type
        self.param = param
        self.code = code
        self.request_id = request_id
        self.headers = headers if headers is not None else httpx.Headers()

    def __str__(self) -> str:
        if self.status_code is None:
            return self.message
        return f"{self.message} (HTTP {self.status_code})"


class BadRequestError(APIError):
    """400: a field is missing, unknown or out of range; `param` names it."""


class AuthenticationError(APIError):
    """401: no key was sent, or not the right one."""


class PermissionDeniedError(APIError):
    """403: the key is valid but may not do this."""


class NotFoundError(APIError):
    """404: no such model, adapter or route."""


class ConflictError(APIError):
    """409: the server's state forbids it, for example the adapter name is taken by other content."""


class TooLargeError(APIError):
    """413: the body is over the server's limit."""


class UnprocessableError(APIError):
    """422: the adapter was read and refused; the message has the reason."""


class RateLimitError(APIError):
    """429: the server's queue is full."""


class ServerError(APIError):
    """5xx: the server failed, or is not ready."""


class InsufficientStorageError(ServerError):
    """507: the server has no room for this."""


_BY_STATUS: dict[int, type[APIError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: TooLargeError,
    422: UnprocessableError,
    429: RateLimitError,
    507: InsufficientStorageError,
}


def error_class(status_code: int) -> type[APIError]:
    """The exception for an HTTP status; plain `APIError` for one without a class of its own."""
    return _BY_STATUS.get(status_code, ServerError if status_code >= 500 else APIError)


def error_from_response(response: httpx.Response) -> APIError:
    """The exception for an error response whose body has been read; the body may be anything."""
    fields = _error_fields(response.text)
    if not fields.get("message"):
        # A proxy's page is no use in full; its first line usually says which proxy and why.
        first_line = response.text.strip().splitlines()[0][:200] if response.text.strip() else ""
        fields["message"] = first_line or response.reason_phrase or "the server gave no reason"
    return error_class(response.status_code)(
        status_code=response.status_code,
        request_id=response.headers.get("x-request-id"),
        headers=response.headers,
        **fields,
    )


def error_from_event(error: object, headers: httpx.Headers) -> APIError:
    """The exception for an `{"error": ...}` event in a stream that began with 200."""
    fields = _known_fields(error)
    if not fields.get("message"):
        fields["message"] = "the server reported an error in the stream"
    return APIError(request_id=headers.get("x-request-id"), headers=headers, **fields)


def error_from_httpx(error: httpx.RequestError | httpx.InvalidURL, url: str) -> APIConnectionError:
    """The exception for a request that got no complete answer from `url`."""
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(f"{url} did not answer in time ({type(error).__name__})")
    transient = isinstance(error, httpx.TransportError) and not isinstance(
        error, httpx.UnsupportedProtocol | httpx.LocalProtocolError
    )
    reason = str(error) or type(error).__name__
    return APIConnectionError(f"{url}: {reason}", transient=transient)


def _error_fields(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(body, Mapping):
        return {}
    # FastAPI's own errors are {"detail": ...}, seen behind gateways that are written with it.
    return _known_fields(body.get("error", body.get("detail")))


def _known_fields(error: object) -> dict[str, Any]:
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, Mapping):
        return {}
    return {key: str(error[key]) for key in ("message", "type", "param", "code") if error.get(key) is not None}
