"""One log line a request, with names and numbers only: what was asked and answered is nobody's business."""

import re
import time
import uuid
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.errors import ApiError, error_response, to_api_error
from loraplex_server.traces import where_of

_log = structlog.get_logger("loraplex.http")

_NOTES = "loraplex.notes"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# Asked by machines every few seconds.
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


def request_id(scope: Scope) -> str:
    """The id of this request, as its answer's ``x-request-id`` has it."""
    notes: dict[str, Any] = scope[_NOTES]
    return str(notes["request_id"])


def note(scope: Scope, **facts: object) -> None:
    """Add facts to the request's log line."""
    scope[_NOTES].update(facts)


def note_failure(scope: Scope, error: Exception) -> None:
    """Say in the log where a request failed. The exception's own words stay out: they may quote a prompt."""
    if isinstance(error, ApiError):
        note(scope, code=error.code)
    elif (code := to_api_error(error).code) != "internal_error":
        note(scope, code=code)
    else:
        note(scope, exception=type(error).__name__, at=where_of(error))


class RequestLog:
    """ASGI middleware, outermost: gives each request its id and its log line, and answers what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        offered = Headers(scope=scope).get("x-request-id", "")
        id = offered if _SANE_ID.fullmatch(offered) else f"req-{uuid.uuid4().hex}"
        scope[_NOTES] = {"request_id": id}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            note_failure(scope, error)
            if status == 0:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            self._write(scope, status, time.perf_counter() - begun)

    def _write(self, scope: Scope, status: int, seconds: float) -> None:
        facts = scope[_NOTES]
        level = "error" if "exception" in facts else "debug" if scope["path"] in _QUIET_PATHS else "info"
        # Without a route (a wrong path) the path is the client's own words.
        path = getattr(scope.get("route"), "path", None)
        # 499: the client left before there was an answer.
        getattr(_log, level)(
            "request",
            method=scope["method"][:16],
            path=path,
            status=status or 499,
            ms=round(seconds * 1000, 1),
            **facts,
        )
