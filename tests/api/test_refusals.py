"""What is refused, with which status, and naming which field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.services import HttpLimits
from tests.api.scripted import say
from tests.api.servers import Server, scripted_services, serve

CHAT = {"model": "poet", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "poet", "prompt": "Hi"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("refusals")
    with serve(scripted_services(folder, adapters=("poet",), limits=HttpLimits(max_body_bytes=200_000))) as server:
        yield server


def post(server: Server, path: str, body: Any, **kwargs: Any) -> tuple[int, dict[str, Any]]:
    with server.http() as http:
        response = http.post(path, json=body, **kwargs)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return response.status_code, error


NOT_SUPPORTED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "audio": {"voice": "x"},
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "x"},
    "functions": [{"name": "f"}],
    "adapter_mode": "merged",
    "adapters": [{"name": "poet", "weight": 0.5}],
    "guided_json": {},
    "best_of": 1,
}


@pytest.mark.parametrize("field", NOT_SUPPORTED)
def test_chat_fields_that_cannot_be_honored(server: Server, field: str) -> None:
    status, error = post(server, "/v1/chat/completions", {**CHAT, field: NOT_SUPPORTED[field]})
    assert status == 400
    assert str(error["param"]).split(".")[0] == field
    assert field in error["message"]


@pytest.mark.parametrize(("field", "value"), [("suffix", "x"), ("best_of", 2), ("messages", []), ("tools", [])])
def test_completion_fields_that_cannot_be_honored(server: Server, field: str, value: object) -> None:
    status, error = post(server, "/v1/completions", {**TEXT, field: value})
    assert (status, error["param"]) == (400, field)


OUT_OF_BOUNDS: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 17),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("frequency_penalty", 3),
    ("presence_penalty", -3),
    ("logit_bias", {str(i): 1 for i in range(301)}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"99999": 1}),
    ("seed", 2**63),
    ("stop", ["a"] * 5),
    ("stop", "x" * 257),
    ("stop", ""),
    ("stop_token_ids", [1] * 65),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [99999]),
    ("max_tokens", -1),
    ("max_tokens", 2**40),
    ("min_tokens", 2**40),
    ("user", "x" * 513),
    ("cache_salt", "x" * 513),
    ("metadata", {str(i): "" for i in range(17)}),
    ("model", ""),
    ("model", "x" * 257),
    ("stream_options", {"include_usage": True}),
    ("adapter_mode", "other"),
    ("temperature", "hot"),
    ("temperature", [0.5]),
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_BOUNDS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)], ids=["c", "t"])
def test_every_parameter_is_bounded(server: Server, path: str, body: dict[str, Any], field: str, value: Any) -> None:
    status, error = post(server, path, {**body, field: value})
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert str(error["param"]).split(".")[0] == field


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("min_tokens", {"max_tokens": 2, "min_tokens": 3}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "user", "content": "x"}] * 2049}),
        ("messages.0.role", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages.0", {"messages": [{"role": "user"}]}),
        ("messages.0.tool_calls", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}),
        ("messages.0.extra", {"messages": [{"role": "user", "content": "x", "extra": 1}]}),
        (
            "messages.0.content.0.type",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "http://a/b.png"}]}]},
        ),
        ("chat_template_kwargs", {"chat_template_kwargs": {"messages": []}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"bos_token": "x"}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"tokenize": False}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"a b": 1}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"a": "x" * 20_000}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {f"a{i}": 1 for i in range(33)}}),
    ],
)
def test_chat_bodies_are_checked(server: Server, param: str, change: dict[str, Any]) -> None:
    status, error = post(server, "/v1/chat/completions", {**CHAT, **change})
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a"] * 257},
        {"prompt": [-1]},
        {"prompt": [320]},
        {"prompt": ["a", 5]},
        {"prompt": ["a"] * 200, "n": 2},
        {"prompt": None},
    ],
)
def test_prompts_are_checked(server: Server, change: dict[str, Any]) -> None:
    status, error = post(server, "/v1/completions", {**TEXT, **change})
    assert status == 400
    assert str(error["param"]).split(".")[0] == "prompt"


def test_logprobs_of_a_completion_are_bounded(server: Server) -> None:
    assert post(server, "/v1/completions", {**TEXT, "logprobs": 21})[1]["param"] == "logprobs"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("name", ["nobody", "poet@9", "poet@", "../etc/passwd", "poet/../poet", "POET"])
def test_an_unknown_model_is_a_404_that_names_the_known(server: Server, path: str, name: str) -> None:
    body = CHAT if "chat" in path else TEXT
    status, error = post(server, path, {**body, "model": name})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "`base-model`" in error["message"]
    assert "`poet`" in error["message"]


def test_a_prompt_that_is_too_long(server: Server) -> None:
    for path, body in (
        ("/v1/completions", {**TEXT, "prompt": "x" * 512}),
        ("/v1/completions", {**TEXT, "prompt": "x" * 100_000}),
        ("/v1/completions", {**TEXT, "prompt": [97] * 600}),
        ("/v1/completions", {**TEXT, "max_tokens": 511}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x" * 600}]}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 500}),
    ):
        status, error = post(server, path, body)
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert "512" in error["message"]


def test_a_body_that_is_too_large(server: Server) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "x" * 300_000}]}
    assert post(server, "/v1/chat/completions", body)[0] == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    with server.http() as http:
        response = http.post("/v1/chat/completions", content=chunks(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "poet"}', b'{"a":' * 5000, b"1" * 5000, b'{"n": NaN}'],
)
def test_bodies_that_are_no_request(server: Server, content: bytes) -> None:
    with server.http() as http:
        response = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_lone_surrogate_is_refused(server: Server) -> None:
    for change in (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
        {"chat_template_kwargs": {"a": "\ud800"}},
        {"stop": "\ud800"},
        {"cache_salt": "\ud800"},
        {"model": "\ud800"},
    ):
        with server.http() as http:
            content = json.dumps({**CHAT, **change}).encode()
            response = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert "surrogate" in response.json()["error"]["message"]


def test_no_such_route_and_no_such_method(server: Server) -> None:
    with server.http() as http:
        missing, wrong = http.get("/v1/nothing"), http.get("/v1/chat/completions")
        slash = http.post("/v1/chat/completions/", json=CHAT)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "route_not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert slash.status_code == 404


def test_messages_do_not_quote_the_prompt(server: Server) -> None:
    canary = "canary-5e1f"
    for body in (
        {**CHAT, "messages": [{"role": canary, "content": canary}]},
        {**CHAT, "messages": [{"role": "user", "content": canary, "x": canary}]},
        {**CHAT, "messages": [{"role": "user", "content": canary * 60}]},
        {**CHAT, "stop": [canary] * 5},
    ):
        _, error = post(server, "/v1/chat/completions", body)
        assert canary not in json.dumps(error)


def test_a_model_without_a_template(tmp_path: Path) -> None:
    services = scripted_services(tmp_path, say("x"))
    services.tokenizer._hf.chat_template = None
    with serve(services) as server:
        body = {**CHAT, "model": "base-model"}
        status, error = post(server, "/v1/chat/completions", body)
        assert (status, error["code"]) == (400, "no_chat_template")
        assert "/v1/completions" in error["message"]
