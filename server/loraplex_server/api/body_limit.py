"""Bounds what a request may send, before and while it is read."""

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.auth import endpoint_of
from loraplex_server.errors import error_response

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_ATTRIBUTE = "__loraplex_bounds_body__"


def bounds_own_body(endpoint: Endpoint) -> Endpoint:
    """Declare that an endpoint bounds its body itself, as uploads do. Goes below the router's decorator."""
    setattr(endpoint, _ATTRIBUTE, True)
    return endpoint


class BodyLimit:
    """ASGI middleware: 413 for larger bodies. Needs to run inside ``AccessControl``."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or getattr(endpoint_of(scope), _ATTRIBUTE, False):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        num_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_bounded, send)

    def _too_large(self) -> HTTPException:
        # FastAPI passes this class on when it comes up while it reads a body; of others it makes a 400.
        return HTTPException(413, f"The body has more than {self._max_bytes} bytes.")
