"""Who may call what: a user key, an admin key, and default deny on the route that will really answer.

Every endpoint says which level it needs (``@access(Access.USER)``); one that says nothing needs the admin key. The level
is read from the route the router will choose for this request, never from the path's text, so that no spelling of a
path can reach an endpoint at another endpoint's level.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_server.errors import ApiError, error_response

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_ATTRIBUTE = "__loraplex_access__"
_ENDPOINT = "loraplex.endpoint"


class Access(IntEnum):
    """What a call needs: nothing, the user key, the admin key."""

    OPEN = 0
    USER = 1
    ADMIN = 2


def access(level: Access) -> Callable[[Endpoint], Endpoint]:
    """Declare what an endpoint needs. Goes below the router's decorator, nearest to the function."""

    def declare(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _ATTRIBUTE, level)
        return endpoint

    return declare


def access_of(endpoint: object) -> Access:
    """The level that an endpoint declares; admin if it declares none."""
    level: Access = getattr(endpoint, _ATTRIBUTE, Access.ADMIN)
    return level


def matching_route(routes: Sequence[BaseRoute], scope: Scope) -> BaseRoute | None:
    """The route that will answer, chosen as the router chooses it: the first that matches, else the first whose path
    does (it answers 405)."""
    partial: BaseRoute | None = None
    for route in routes:
        match, _ = route.matches(dict(scope))
        if match is Match.FULL:
            return route
        if match is Match.PARTIAL and partial is None:
            partial = route
    return partial


def endpoint_of(scope: Scope) -> object:
    """The endpoint that will answer this request; None for a path without a route, or a mounted app."""
    return scope.get(_ENDPOINT)


@dataclass(frozen=True)
class Keys:
    """The keys that open the server. Several of each are allowed, so that one can be replaced without a pause.

    ``loopback``: the server listens on this machine only; without any key, admin calls are open there and only there.
    """

    user: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    loopback: bool = False
    _user_digests: tuple[bytes, ...] = field(init=False, repr=False, compare=False)
    _admin_digests: tuple[bytes, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if any(not key.strip() for key in (*self.user, *self.admin)):
            raise ValueError("a key is empty; leave it out to serve without one")
        object.__setattr__(self, "_user_digests", tuple(_digest(key.encode()) for key in self.user))
        object.__setattr__(self, "_admin_digests", tuple(_digest(key.encode()) for key in self.admin))

    def __repr__(self) -> str:
        return f"Keys(user={len(self.user)}, admin={len(self.admin)}, loopback={self.loopback})"

    @property
    def are_set(self) -> bool:
        """True if any key is set; then every call that is not open needs one."""
        return bool(self.user or self.admin)

    def check(self, level: Access, headers: Headers) -> None:
        """Raises ApiError (401 or 403) unless these headers may make a call of this level."""
        if level is Access.OPEN:
            return
        if not self.are_set:
            if level is Access.ADMIN:
                self._check_keyless_admin(headers)
            return
        offered = [_digest(key) for key in _offered_keys(headers)]
        if _any_equal(offered, self._admin_digests):
            return
        is_user = _any_equal(offered, self._user_digests)
        if is_user and level is Access.USER:
            return
        if is_user:
            way_out = "send the admin key" if self.admin else "start the server with an admin key (--admin-key)"
            raise ApiError(f"This call needs the admin key; {way_out}.", status=403, code="admin_key_required")
        raise ApiError(
            "Incorrect API key."
            if offered
            else "No API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _check_keyless_admin(self, headers: Headers) -> None:
        # A web page can make a browser on this machine call us; it cannot forge these two headers.
        if self.loopback and is_loopback(headers.get("host", "")) and _is_local_origin(headers.get("origin")):
            return
        raise ApiError(
            "Admin calls need an admin key: start the server with --admin-key, or bind it to 127.0.0.1 and call it there.",
            status=403,
            code="admin_key_required",
        )


class AccessControl:
    """ASGI middleware: refuses a call before its body is read."""

    def __init__(self, app: ASGIApp, *, keys: Keys, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._keys = keys
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            route = matching_route(self._routes, scope)
            scope[_ENDPOINT] = getattr(route, "endpoint", None)
            # A path without a route is a 404 for those who hold a key, and says nothing to others.
            level = Access.USER if route is None else access_of(scope[_ENDPOINT])
            try:
                self._keys.check(level, Headers(scope=scope))
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _any_equal(offered: Iterable[bytes], known: Iterable[bytes]) -> bool:
    """Compares every pair in constant time, so that the time says neither which key matched nor how much of it."""
    known = tuple(known)
    found = False
    for digest in offered:
        for key in known:
            found |= hmac.compare_digest(digest, key)
    return found


def _offered_keys(headers: Headers) -> list[bytes]:
    keys = []
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        keys.append(token.strip().encode("latin-1"))
    if api_key := headers.get("x-api-key", "").strip():
        keys.append(api_key.encode("latin-1"))
    return keys


def is_loopback(host: str) -> bool:
    """True for an address (or Host header) that only this machine can mean."""
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"  # a bare IPv6 address
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _is_local_origin(origin: str | None) -> bool:
    return origin is None or is_loopback(origin.partition("://")[2])
