"""The one table: exception -> HTTP status and OpenAI error body.

Every answer that is not a success has the body ``{"error": {"message", "type", "param", "code"}}``. Messages never repeat
what a user wrote in a prompt.
"""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from loraplex_adapters import errors as adapters
from loraplex_server.engine.messages import Failure
from loraplex_server.engine.worker import EngineCallFailed, EngineStopped, QueueFull


class ApiError(Exception):
    """An answer that is not a success: what the HTTP side itself refuses, and what the table makes of the rest."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The OpenAI error body."""
        error = {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}
        return {"error": error}


# The `openai` client repeats a 409; these stay as they are however often they are asked.
_NO_RETRY = {"x-should-retry": "false"}

# Looked up along the exception's classes, the nearest first.
_ADAPTERS: dict[type[adapters.AdapterError], tuple[int, Mapping[str, str]]] = {
    adapters.AdapterError: (400, {}),
    adapters.InvalidAdapter: (422, {}),
    adapters.AdapterTooLarge: (413, {}),
    adapters.AdapterNotFound: (404, {}),
    adapters.AdapterNameTaken: (409, _NO_RETRY),
    adapters.AdapterPinned: (409, _NO_RETRY),
    adapters.SourceRefused: (403, {}),
    adapters.SourceUnavailable: (502, {}),
    adapters.StoreFull: (507, _NO_RETRY),
}

_FAILURES: dict[str, tuple[int, str]] = {
    "adapter_load_failed": (503, "adapter_load_failed"),
    "out_of_memory": (503, "out_of_memory"),
    "context_too_long": (400, "context_length_exceeded"),
    "engine_error": (500, "engine_error"),
    "shutting_down": (503, "shutting_down"),
}

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def to_api_error(error: Exception) -> ApiError:
    """The table. What it does not know is our own mistake: a 500 that says nothing of the cause."""
    match error:
        case ApiError():
            return error
        case adapters.AdapterError():
            status, headers = next(_ADAPTERS[cls] for cls in type(error).__mro__ if cls in _ADAPTERS)
            return ApiError(str(error), status=status, code=error.code, headers=headers)
        case QueueFull():
            return ApiError(
                "The server is busy: its queue is full. Try again later.",
                status=429,
                code="queue_full",
                headers=_retry_after(error.retry_after_s),
            )
        case EngineStopped():
            return ApiError(
                "The server takes no new requests: it is starting, shutting down, or its engine has stopped.",
                status=503,
                code="not_ready",
                headers=_retry_after(1.0),
            )
        case EngineCallFailed():
            return failure_error(error.failure)
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return ApiError(_phrase(error), status=error.status_code, code=_code(error), headers=error.headers)
    return ApiError("The server failed on this request; its log has the cause.", status=500, code="internal_error")


def failure_error(failure: Failure) -> ApiError:
    """What the engine reports about one request, as an answer."""
    status, code = _FAILURES.get(failure.code, (500, failure.code))
    return ApiError(failure.message, status=status, code=code, headers=_retry_after(1.0) if status == 503 else None)


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed."""
    api_error = to_api_error(error)
    return JSONResponse(api_error.body, status_code=api_error.status, headers=api_error.headers)


def _type(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _retry_after(seconds: float) -> dict[str, str]:
    # The header counts whole seconds; the `openai` client prefers the exact one.
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, round(seconds * 1000)))}


def _phrase(error: HTTPException) -> str:
    standard = HTTPStatus(error.status_code).phrase
    if error.status_code == 404 and error.detail == standard:
        return "There is no such route; /docs lists them all."
    return f"{error.detail}." if error.detail == standard else str(error.detail)


def _code(error: HTTPException) -> str | None:
    return {404: "route_not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)


def _invalid(errors: Sequence[Any]) -> ApiError:
    """The deepest complaint: of the forms a field may take, it is about the one the user meant."""
    worst = max(errors, key=lambda entry: len(entry["loc"]))
    kind, path = worst["type"], _path(worst["loc"])
    if kind == "json_invalid":
        return ApiError(f"The body is not valid JSON: {worst['ctx']['error']}.", code="invalid_json")
    if not path:
        return ApiError(
            "The body must be a JSON object, sent with content-type: application/json.", code="invalid_body"
        )
    if kind == "extra_forbidden":
        return ApiError(f"Unknown field `{path}`.", param=path, code="unknown_field")
    if kind == "missing":
        return ApiError(f"The field `{path}` is required.", param=path, code="missing_field")
    reason = worst["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return ApiError(f"`{path}`: {reason[:1].lower()}{reason[1:]}.", param=path, code="invalid_value")


def _path(loc: Sequence[str | int]) -> str:
    """`messages.0.content` out of pydantic's location, which also names the forms a field may take."""
    parts = [str(part) for part in loc[1:]]
    return ".".join(
        part for part in parts if part not in ("str", "int", "float", "bool") and not set(part) & set("[({")
    )
