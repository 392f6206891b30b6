"""What survives a kill, and how a server ends when it is asked to."""

import json
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex_server.demo import DEMO_ADAPTERS
from tests.e2e.making import unique, zipped
from tests.e2e.serving import (
    ADMIN_KEY,
    ANSWERS,
    BASE,
    ServerProcess,
    chat_body,
    events,
    long_body,
    text_of,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restart") / "data"


@pytest.fixture(scope="module")
def before(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A server with versions, a pin and an alias, killed in mid-upload; what it knew."""
    server = ServerProcess(data_dir)
    try:
        assert server.upload("style", DEMO_ADAPTERS["shout"]).status_code == 201
        assert server.upload("style", DEMO_ADAPTERS["pirate"], replace="true").status_code == 201
        assert server.upload("held", DEMO_ADAPTERS["emoji"], pinned="true").status_code == 201
        assert server.admin.patch("/v1/adapters/held", json={"alias": "smile"}).status_code == 200
        assert server.admin.patch("/v1/adapters/style", json={"version": 1}).status_code == 200
        known = state_of(server)
        with HalfAnUpload(server, unique(tmp_path_factory.mktemp("half") / "a", seed=5)):
            deadline = time.monotonic() + 10
            while not any((data_dir / "incoming").glob("*/*.part")):
                assert time.monotonic() < deadline, "the upload never began"
                time.sleep(0.01)
            server.process.kill()
            server.process.wait()
    finally:
        server.kill()
    return known


@pytest.fixture(scope="module")
def restarted(data_dir: Path, before: dict[str, Any]) -> Iterator[ServerProcess]:
    server = ServerProcess(data_dir, "--drain-timeout-s", "30")
    yield server
    server.kill()


class HalfAnUpload:
    """The first half of an upload on a connection that stays open."""

    def __init__(self, server: ServerProcess, folder: Path) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)))
        part = '--x\r\ncontent-disposition: form-data; name="{}"{}\r\n\r\n'
        form = part.format("name", "") + "style\r\n" + part.format("replace", "") + "true\r\n"
        body = (form + part.format("file", '; filename="a.zip"')).encode() + zipped(folder)
        head = (
            f"POST /v1/adapters HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {ADMIN_KEY}\r\n"
            f"content-type: multipart/form-data; boundary=x\r\ncontent-length: {len(body) + 2_000_000}\r\n\r\n"
        )
        # Uploads are written in pieces of a megabyte.
        self._socket.sendall(head.encode() + body + bytes(1_500_000 - len(body)))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def state_of(server: ServerProcess) -> dict[str, Any]:
    """Names, versions, digests, pins and aliases."""
    adapters = server.admin.get("/v1/adapters").json()["data"]
    kept = ("digest", "version", "pinned", "aliases", "default_mode", "created_at")
    state = {adapter["name"]: {key: adapter[key] for key in kept} for adapter in adapters}
    for name, facts in state.items():
        facts["versions"] = server.admin.get(f"/v1/adapters/{name}/versions").json()["data"]
    return state


def test_a_server_killed_in_mid_upload_comes_back_as_it_was(restarted: ServerProcess, before: dict[str, Any]) -> None:
    assert state_of(restarted) == before
    assert set(before) == {"shout", "json", "pirate", "style", "held"}
    assert not any((restarted.data_dir / "incoming").iterdir())
    in_use = {version["digest"] for facts in before.values() for version in facts["versions"]}
    assert {path.name for path in (restarted.data_dir / "adapters").iterdir()} == in_use
    with sqlite3.connect(restarted.data_dir / "registry.sqlite") as registry:
        assert registry.execute("pragma integrity_check").fetchone() == ("ok",)


def test_after_a_restart_every_name_answers_as_before(restarted: ServerProcess) -> None:
    assert restarted.answer("style") == ANSWERS["shout"]
    assert restarted.answer("style@2") == ANSWERS["pirate"]
    assert restarted.answer("smile") == restarted.answer("held")
    assert restarted.admin.get("/v1/adapters/held").json()["residency"] == "gpu"


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(restarted: ServerProcess) -> None:
    server, ended = restarted, {}
    begun = threading.Barrier(4)

    def stream(number: int) -> None:
        body = long_body(["shout", BASE, "held"][number], 300, stream=True)
        with server.user.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            begun.wait(timeout=30)
            ended[number] = events([first, *lines])

    def ask() -> None:
        ended["plain"] = server.user.post("/v1/chat/completions", json=long_body("pirate", 300)).json()

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(3)]
    threads.append(threading.Thread(target=ask))
    for thread in threads:
        thread.start()
    begun.wait(timeout=30)
    server.until("vllm:num_requests_running", 4)
    asked_at = time.monotonic()
    server.signal(signal.SIGTERM)
    while httpx.get(f"{server.url}/ready").status_code == 200:
        assert time.monotonic() < asked_at + 5, "/ready stayed 200"
        time.sleep(0.005)
    refused = server.user.post("/v1/chat/completions", json=chat_body())
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "not_ready"
    assert refused.headers["retry-after"]
    assert httpx.get(f"{server.url}/health").status_code == 200
    for thread in threads:
        thread.join(timeout=60)
    assert all(text_of(ended[number]) for number in range(3))
    assert ended["plain"]["choices"][0]["finish_reason"] == "length"
    assert server.wait(20) == 0
    assert json.loads(server.log_text().splitlines()[-1])["event"] == "stopped"


def test_a_restart_after_a_drain_needs_no_repair(data_dir: Path, restarted: ServerProcess) -> None:
    assert restarted.process.poll() is not None
    with sqlite3.connect(data_dir / "registry.sqlite") as registry:
        assert registry.execute("pragma integrity_check").fetchone() == ("ok",)
    assert not any((data_dir / "incoming").iterdir())
