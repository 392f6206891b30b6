"""P19: what users write and what they are answered stays out of the log and out of errors."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.api.scripted import fail, say
from tests.api.servers import Server, scripted_services, serve, wait_until

CANARY = "canary-7f3a"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serve(scripted_services(tmp_path, say(CANARY), adapters=("poet",))) as server:
        yield server


def test_a_line_a_request_without_its_words(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": "poet", "messages": [{"role": "user", "content": CANARY}], "user": CANARY, "stop": CANARY + "!"}
    with structlog.testing.capture_logs() as captured, server.http() as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert http.post("/v1/chat/completions", json={**body, "stream": True}).status_code == 200
        assert http.post("/v1/completions", json={"model": "poet", "prompt": CANARY}).status_code == 200
        assert http.get(f"/v1/{CANARY}?{CANARY}").status_code == 404
        wait_until(lambda: len(captured) == 4)
    lines = [line for line in captured if line["event"] == "request"]
    assert len(lines) == 4
    assert lines[0]["path"] == "/v1/chat/completions"
    assert (lines[0]["adapter"], lines[0]["status"], lines[0]["outcome"]) == ("poet@1", 200, "stop")
    assert lines[0]["output_tokens"] == len(CANARY) + 1
    assert CANARY not in json.dumps(captured, default=str)
    assert not [record for record in caplog.records if record.name.startswith("uvicorn") and CANARY in str(record.args)]


def test_failures_are_logged_without_their_words(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"cannot encode {CANARY}")

    body = {"model": "poet", "messages": [{"role": "user", "content": CANARY}]}
    with structlog.testing.capture_logs() as captured, server.http() as http:
        server.worker.script = fail("engine_error", after="ab")
        http.post("/v1/chat/completions", json={**body, "stream": True})
        monkeypatch.setattr(server.services.tokenizer, "encode", broken)
        response = http.post("/v1/chat/completions", json=body)
        wait_until(lambda: len(captured) == 2)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert CANARY not in response.text
    last = captured[-1]
    assert last["exception"] == "RuntimeError"
    assert any("broken" in place for place in last["at"])
    assert CANARY not in json.dumps(captured, default=str)
