"""P1: every route needs its key, however it is spelled, and new routes are denied by default."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from loraplex_server.app import create_app
from loraplex_server.auth import Access, Keys, access_of, is_loopback
from tests.api.servers import Server, scripted_services, serve

USER, ADMIN, WRONG = "user-key", "admin-key", "wrong-key"
OPEN_PATHS = {"/health", "/ready"}
USER_PATHS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{model:path}",
    "/tokenize",
    "/detokenize",
    "/version",
    "/docs",
    "/openapi.json",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("auth")
    keys = Keys(user=(USER, "second-user-key"), admin=(ADMIN,))
    with serve(scripted_services(folder, adapters=("poet",), keys=keys)) as server:
        yield server


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    services = scripted_services(tmp_path_factory.mktemp("routes"))
    services.registry.close()
    return create_app(services)


def calls(app: FastAPI) -> list[tuple[str, str, Access]]:
    """Every method and path, with the level its endpoint declares."""
    return [
        (method, route.path, access_of(route.endpoint))
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]


def test_each_route_declares_what_it_needs(app: FastAPI) -> None:
    levels = {path: level for _, path, level in calls(app)}
    assert {path for path, level in levels.items() if level is Access.OPEN} == OPEN_PATHS
    assert {path for path, level in levels.items() if level is Access.USER} == USER_PATHS
    assert any(level is Access.ADMIN for level in levels.values())
    assert all(isinstance(route, Route) for route in app.routes), "only plain routes can declare a level"


def test_all_routes_with_no_wrong_user_and_admin_key(server: Server, app: FastAPI) -> None:
    def status(method: str, path: str, key: str | None) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        url = path.replace("{model:path}", "poet").replace("{name:path}", "nobody")
        return http.request(method, url, headers=headers).status_code

    with server.http() as http:
        for method, path, level in calls(app):
            for key in (None, WRONG, USER + "x", USER[:-1]):
                refused = status(method, path, key) == 401
                assert refused == (level is not Access.OPEN), (method, path, key)
            for key in (USER, "second-user-key"):
                refused = status(method, path, key) == 403
                assert refused == (level is Access.ADMIN), (method, path, key)
            assert status(method, path, ADMIN) not in (401, 403), (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {USER}"},
        {"authorization": f"bearer   {USER}"},
        {"x-api-key": USER},
        {"authorization": "Bearer other", "x-api-key": USER},
    ],
)
def test_ways_to_send_a_key(server: Server, headers: dict[str, str]) -> None:
    with server.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": USER},
        {"authorization": f"Basic {USER}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \xff\xfe"},
        {"x-api-key": f"Bearer {USER}"},
        {"cookie": f"key={USER}"},
    ],
)
def test_ways_that_are_none(server: Server, headers: dict[str, str]) -> None:
    with server.http() as http:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        response = http.get("/v1/models", headers=encoded)
        by_query = http.get("/v1/models", params={"api_key": USER, "key": USER})
    assert response.status_code == by_query.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def raw_status(server: Server, request: str) -> int:
    """The status of bytes sent as they are."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request.encode("latin-1"))
        answer = connection.recv(4096)
    return int(answer.split()[1])


ODD_TARGETS = [
    "//v1/models",
    "/v1//models",
    "/V1/MODELS",
    "/v1/models/",
    "/v1/models%2f",
    "/v1/%6dodels",
    "/health/../v1/models",
    "/health%2f..%2fv1/models",
    "/health;/../v1/models",
    "/health?x=/v1/models",
    "/v1/models?/health",
    "/v1/models#/health",
    "/v1/adapters%00",
    "/v1/models/health",
    "http://localhost/v1/models",
    "http://localhost/health/../v1/adapters",
    "/metrics/../v1/adapters",
    "/.%2e/v1/adapters",
]


@pytest.mark.parametrize("target", ODD_TARGETS)
@pytest.mark.parametrize("host", ["localhost", "evil.example", "", "health", "a/health", "[::1]:80", "x y"])
def test_no_spelling_of_a_path_or_host_opens_a_route(server: Server, target: str, host: str) -> None:
    status = raw_status(server, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    assert status in (400, 401) or target.startswith("/health?")


@pytest.mark.parametrize(
    "header", ["X-Original-URL: /health", "X-Rewrite-URL: /health", "X-Forwarded-Prefix: /health", "X-HTTP-Method: GET"]
)
def test_no_header_changes_the_route(server: Server, header: str) -> None:
    request = f"GET /v1/adapters HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n\r\n"
    assert raw_status(server, request) == 401


def test_other_methods_need_the_key_too(server: Server) -> None:
    for method in ("HEAD", "OPTIONS", "TRACE", "PUT", "PROPFIND"):
        status = raw_status(server, f"{method} /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert status == 401, method


def test_made_up_methods_reach_nobody(server: Server) -> None:
    status = raw_status(server, "BREW /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    # 400 where the parser knows only methods that there are.
    assert status in (400, 401)


def test_a_route_that_declares_nothing_is_for_admins(tmp_path: Path) -> None:
    async def forgotten(request: Any) -> PlainTextResponse:
        return PlainTextResponse("secret")

    services = scripted_services(tmp_path, keys=Keys(user=(USER,), admin=(ADMIN,)))
    app = create_app(services)
    app.add_api_route("/forgotten", lambda: "secret")
    app.router.routes.append(Route("/plain", forgotten))
    app.router.routes.append(Mount("/mounted", routes=[Route("/inside", forgotten)]))
    with serve(services, app) as server, server.http() as http:
        for path in ("/forgotten", "/plain", "/mounted/inside"):
            assert http.get(path).status_code == 401
            assert http.get(path, headers={"x-api-key": USER}).status_code == 403
            assert http.get(path, headers={"x-api-key": ADMIN}).status_code == 200


def test_the_body_of_a_refused_call_is_not_read(server: Server) -> None:
    request = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    assert raw_status(server, request) == 401


def test_only_a_user_key_leaves_admin_calls_closed(tmp_path: Path) -> None:
    with serve(scripted_services(tmp_path, keys=Keys(user=(USER,), loopback=True))) as server, server.http() as http:
        response = http.get("/v1/adapters", headers={"x-api-key": USER})
    assert response.status_code == 403
    assert "--admin-key" in response.json()["error"]["message"]


def test_only_an_admin_key_closes_everything(tmp_path: Path) -> None:
    with serve(scripted_services(tmp_path, keys=Keys(admin=(ADMIN,), loopback=True))) as server, server.http() as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={"x-api-key": ADMIN}).status_code == 200


def admin_status(server: Server, **headers: str) -> int:
    return httpx.get(f"{server.url}/v1/adapters", headers=headers, trust_env=False).status_code


def test_without_keys_admin_calls_are_open_on_loopback_only(tmp_path: Path) -> None:
    with serve(scripted_services(tmp_path, keys=Keys(loopback=True))) as server:
        assert admin_status(server) not in (401, 403)
        assert admin_status(server, origin="http://localhost:3000") not in (401, 403)
        # A page from elsewhere, in a browser on this machine: by its name, or by one that resolves to us.
        assert admin_status(server, origin="https://evil.example") == 403
        assert admin_status(server, origin="null") == 403
        assert admin_status(server, host="evil.example") == 403
    (tmp_path / "other").mkdir()
    with serve(scripted_services(tmp_path / "other", keys=Keys())) as server:
        assert admin_status(server) == 403
        assert httpx.get(f"{server.url}/v1/models", trust_env=False).status_code == 200


def test_keys_are_not_shown_and_not_empty() -> None:
    keys = Keys(user=(USER,), admin=(ADMIN,))
    assert USER not in repr(keys)
    assert ADMIN not in repr(keys)
    with pytest.raises(ValueError, match="empty"):
        Keys(user=(" ",))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]:80", True),
        ("0.0.0.0", False),
        ("a.b", False),
    ],
)
def test_loopback_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
