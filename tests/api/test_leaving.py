"""P16: a client that leaves frees its place; and what the metrics hear of each request."""

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.api.scripted import fail, say
from tests.api.servers import Server, scripted_services, serve, wait_until

BODY = {"model": "poet", "messages": [{"role": "user", "content": "Hi"}]}


@dataclass
class Heard:
    """One request, as the metrics saw it."""

    adapter: str | None
    mode: str
    first: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: list[dict[str, Any]] = field(default_factory=list)

    def on_first_token(self, seconds: float) -> None:
        self.first.append(seconds)

    def on_tokens(self, count: int, gap_s: float) -> None:
        assert gap_s >= 0
        self.tokens.append(count)

    def on_finish(self, outcome: str, **facts: Any) -> None:
        self.finished.append({"outcome": outcome, **facts})


class Listener:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []

    def start(self, adapter: str | None, mode: str) -> Heard:
        self.heard.append(Heard(adapter, mode))
        return self.heard[-1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("leaving")
    listener: Any = Listener()
    with serve(scripted_services(folder, adapters=("poet",), metrics=listener)) as server:
        yield server


@pytest.fixture(autouse=True)
def listener(server: Server) -> Any:
    server.worker.requests.clear()
    server.worker.aborted.clear()
    listener: Any = server.services.metrics
    listener.heard.clear()
    return listener


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_frees_its_places(server: Server, listener: Listener, n: int) -> None:
    server.worker.script = say("x" * 300, pause_s=0.02)
    body = {**BODY, "n": n, "stream": True}
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = response.iter_bytes()  # closes the connection when it is dropped
        next(pieces)
        assert len(server.worker.running_ids) == n
    wait_until(lambda: not server.worker.running_ids)
    assert set(server.worker.aborted) == {request.id for request in server.worker.requests}
    assert [finish["outcome"] for finish in listener.heard[0].finished] == ["abort"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_leaving_a_plain_request_frees_its_places(server: Server, listener: Listener, path: str, n: int) -> None:
    server.worker.script = say("x" * 300, pause_s=0.02)
    body = {**BODY, "n": n} if "chat" in path else {"model": "poet", "prompt": "Hi", "n": n, "max_tokens": 300}
    with pytest.raises(httpx.ReadTimeout), server.http() as http:
        http.post(path, json=body, timeout=0.3)
    wait_until(lambda: not server.worker.running_ids)
    assert len(server.worker.aborted) == n
    assert listener.heard[0].finished[0]["outcome"] == "abort"


def test_leaving_before_the_first_token_frees_the_place(server: Server) -> None:
    server.worker.script = lambda request: [60.0]
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout), server.http() as http:
            http.post("/v1/chat/completions", json={**BODY, "stream": stream}, timeout=0.2)
        wait_until(lambda: not server.worker.running_ids)


def test_a_connection_cut_without_goodbye_frees_the_place(server: Server) -> None:
    server.worker.script = say("x" * 300, pause_s=0.02)
    content = json.dumps({**BODY, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as connection:
        connection.sendall(head.encode() + content)
        connection.recv(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    wait_until(lambda: not server.worker.running_ids)


def test_the_metrics_hear_a_request_once(server: Server, listener: Listener) -> None:
    server.worker.script = say("abcdef", pause_s=0.01)
    with server.http() as http:
        http.post("/v1/chat/completions", json=BODY)
        http.post("/v1/chat/completions", json={**BODY, "model": "base-model", "max_tokens": 3, "n": 2})
    one, two = listener.heard
    assert (one.adapter, one.mode, two.adapter, two.mode) == ("poet", "unmerged", None, "base")
    assert len(one.first) == len(two.first) == 1
    assert 1 + sum(one.tokens) == 7
    assert one.finished[0]["outcome"] == "stop"
    assert one.finished[0]["output_tokens"] == 7
    assert one.finished[0]["queue_s"] == 0.001
    assert one.finished[0]["prompt_tokens"] > 0
    assert two.finished[0]["outcome"] == "length"
    assert two.finished[0]["output_tokens"] == 6
    assert len(one.finished) == len(two.finished) == 1


def test_the_metrics_hear_of_failures_and_rejections(server: Server, listener: Listener) -> None:
    with server.http() as http:
        server.worker.script = fail("engine_error", after="ab")
        http.post("/v1/chat/completions", json={**BODY, "stream": True})
        http.post("/v1/chat/completions", json=BODY)
        server.worker.queue_full_after = 0
        http.post("/v1/chat/completions", json=BODY)
        server.worker.queue_full_after = None
    assert [heard.finished[0]["outcome"] for heard in listener.heard] == ["error", "error", "rejected"]
    assert listener.heard[2].finished[0]["queue_s"] is None


def test_what_arrives_together_is_sent_together(server: Server) -> None:
    server.worker.script = say("x" * 100, per_output=25)
    with server.http() as http:
        text = http.post("/v1/chat/completions", json={**BODY, "stream": True}).text
    chunks = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(contents) == "x" * 100
    assert len([content for content in contents if content]) <= 4
