"""Streamed events to the byte: they are written in pieces, and must be what dumping each as a whole would give."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from tests.api.scripted import say
from tests.api.servers import Server, scripted_services, serve

TEXT = 'She said "hé",\n\t你好 😀 </script>\\ \x7f'
ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(scripted_services(tmp_path_factory.mktemp("events"), say(TEXT))) as server:
        yield server


def events(server: Server, path: str, **body: Any) -> list[bytes]:
    """The raw events of a stream, [DONE] left out."""
    with server.http() as client:
        answer = client.post(path, json={"model": "base-model", "stream": True, **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *found, done, rest = answer.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"logprobs": True, "top_logprobs": 2},
        {"n": 3},
        {"max_tokens": 4},
    ],
    ids=str,
)
def test_a_chats_events_are_what_dumping_them_would_give(server: Server, options: dict[str, Any]) -> None:
    found = events(server, "/v1/chat/completions", messages=ASK, **options)
    for event in found:
        body = json.loads(event.removeprefix(b"data: "))
        assert event == b"data: " + json.dumps(body, separators=(",", ":")).encode()
        ChatCompletionChunk.model_validate(body, strict=True)
        keys = ["id", "object", "created", "model", "system_fingerprint", "choices"]
        assert list(body) == [*keys, *(["usage"] if "stream_options" in options else [])]
        for choice in body["choices"]:
            assert list(choice) == ["index", "delta", "logprobs", "finish_reason"]
    text = "".join(
        choice["delta"].get("content", "")
        for event in found
        for choice in json.loads(event[6:])["choices"]
        if choice["index"] == 0
    )
    assert text == (TEXT[:4] if "max_tokens" in options else TEXT)


@pytest.mark.parametrize(
    "options", [{}, {"stream_options": {"include_usage": True}}, {"logprobs": 2}, {"echo": True}], ids=str
)
def test_a_completions_events_are_what_dumping_them_would_give(server: Server, options: dict[str, Any]) -> None:
    for event in events(server, "/v1/completions", prompt="Hi", max_tokens=100, **options):
        body = json.loads(event.removeprefix(b"data: "))
        assert event == b"data: " + json.dumps(body, separators=(",", ":")).encode()
        if body["choices"][:1] and body["choices"][0]["finish_reason"]:
            Completion.model_validate(body, strict=True)
        for choice in body["choices"]:
            assert list(choice) == ["index", "text", "logprobs", "finish_reason"]
