"""The web server's own bounds, below the application."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from loraplex_server import web
from loraplex_server.web import MAX_HEAD_BYTES


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture(scope="module", params=["httptools", "h11"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"])])
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "h11":
            patch.setattr(web, "find_spec", lambda name: None)
        config = web.web_config(app, "127.0.0.1", 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(20)


def answers(port: int, parts: list[bytes]) -> bytes:
    """What comes back for these bytes, sent one after the other."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        for part in parts:
            try:
                client.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.002)
        received = b""
        while b"\r\n\r\n" not in received and (data := client.recv(1 << 16)):
            received += data
        return received


def test_a_head_without_end_is_refused(port: int) -> None:
    parts = [b"GET / HTTP/1.1\r\nhost: x\r\n", *[b"x-filler: " + b"a" * 4000 + b"\r\n"] * 40]
    assert answers(port, parts).startswith(b"HTTP/1.1 400")


def test_a_header_without_end_is_refused(port: int) -> None:
    parts = [b"GET / HTTP/1.1\r\nhost: x\r\nx-filler: ", *[b"a" * 4000] * 40]
    assert answers(port, parts).startswith(b"HTTP/1.1 400")


def test_heads_within_the_bound_and_bodies_beyond_it_pass(port: int) -> None:
    size = 3 * MAX_HEAD_BYTES
    head = b"POST / HTTP/1.1\r\nhost: x\r\nx-filler: " + b"a" * 8000 + b"\r\ncontent-length: %d\r\n\r\n" % size
    assert answers(port, [head[:50], head[50:], b"b" * size]).startswith(b"HTTP/1.1 200")
