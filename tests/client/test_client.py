"""Every method of both clients: what it sends and what it makes of the answer."""

from __future__ import annotations

import inspect
from typing import Any

import httpx
import pytest

from loraplex_client import (
    Adapter,
    APIConnectionError,
    AsyncLoraplex,
    ChatCompletion,
    Completion,
    Loraplex,
    Message,
    NotFoundError,
    ResponseFormatError,
)

from .drivers import BASE_URL, Driver, Script, adapter_json, chat_answer, error_answer


def answer(value: Any, status_code: int = 200, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): header for name, header in headers.items()}
    return httpx.Response(status_code, json=value, headers=names)


MODELS = answer({"object": "list", "data": [{"id": "pirate", "parent": "tiny"}, {"id": "tiny", "parent": None}]})


def test_chat_sends_the_text_and_every_parameter(driver: Driver) -> None:
    script = Script(
        answer(chat_answer("Arr"), x_request_id="req-1", x_loraplex_adapter="pirate", x_loraplex_mode="merged")
    )
    reply = driver.call(script, "chat", "hello", model="pirate", max_tokens=5, adapter_mode="merged")
    assert script.json() == {
        "model": "pirate",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "adapter_mode": "merged",
    }
    request = script.requests[0]
    assert (request.method, str(request.url)) == ("POST", f"{BASE_URL}/v1/chat/completions")
    assert request.headers["authorization"] == "Bearer user-key"
    assert isinstance(reply, ChatCompletion)
    assert reply.text == "Arr"
    assert reply.usage is not None
    assert (reply.usage.total_tokens, reply.usage.cached_tokens) == (4, 0)
    assert (reply.served.request_id, reply.served.adapter, reply.served.mode) == ("req-1", "pirate", "merged")


def test_chat_takes_messages_of_earlier_answers(driver: Driver) -> None:
    script = Script(answer(chat_answer()))
    conversation = [{"role": "user", "content": "a"}, Message(role="assistant", content="b")]
    driver.call(script, "chat", conversation, model="base")
    assert script.json()["messages"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_chat_without_a_model_asks_for_the_base(driver: Driver) -> None:
    script = Script(MODELS, answer(chat_answer()))
    driver.call(script, "chat", "hello")
    assert [request.url.path for request in script.requests] == ["/v1/models", "/v1/chat/completions"]
    assert script.json()["model"] == "tiny"


def test_the_base_is_looked_up_once() -> None:
    script = Script(MODELS, answer(chat_answer()))
    with Loraplex(BASE_URL, transport=httpx.MockTransport(script)) as client:
        client.chat("one")
        client.chat("two")
    assert [request.url.path for request in script.requests].count("/v1/models") == 1


def test_a_server_without_a_base_is_an_error(driver: Driver) -> None:
    with pytest.raises(ResponseFormatError, match="model="):
        driver.call(Script(answer({"data": []})), "chat", "hello")


def test_completions(driver: Driver) -> None:
    script = Script(answer({"id": "cmpl-1", "choices": [{"index": 0, "text": " world"}, {"index": 1, "text": "!"}]}))
    reply = driver.call(script, "completions", [1, 2], model="base", n=2)
    assert script.json() == {"model": "base", "prompt": [1, 2], "n": 2}
    assert isinstance(reply, Completion)
    assert reply.text == " world"


def test_models(driver: Driver) -> None:
    cards = driver.call(Script(MODELS), "models.list")
    assert [(card.id, card.parent) for card in cards] == [("pirate", "tiny"), ("tiny", None)]
    script = Script(answer({"id": "org/pirate", "loraplex": {"rank": 8}}))
    card = driver.call(script, "models.get", "org/pirate")
    assert card.loraplex == {"rank": 8}
    assert script.requests[0].url.raw_path == b"/v1/models/org%2Fpirate"


def test_tokenize_a_text_and_a_conversation(driver: Driver) -> None:
    script = Script(answer({"tokens": [1, 2], "count": 2, "max_model_len": 64}))
    tokens = driver.call(script, "tokenize", "hello", model="base")
    assert (tokens.tokens, tokens.count, tokens.max_model_len) == ([1, 2], 2, 64)
    assert script.json() == {"model": "base", "prompt": "hello"}
    driver.call(script, "tokenize", [{"role": "user", "content": "hello"}], model="base")
    assert script.json() == {"model": "base", "messages": [{"role": "user", "content": "hello"}]}


def test_detokenize(driver: Driver) -> None:
    script = Script(answer({"prompt": "hello"}))
    assert driver.call(script, "detokenize", iter([1, 2]), model="base") == "hello"
    assert script.json() == {"model": "base", "tokens": [1, 2]}
    with pytest.raises(ResponseFormatError):
        driver.call(Script(answer({"text": "hello"})), "detokenize", [1], model="base")


@pytest.mark.parametrize("probe", ["health", "ready"])
def test_probes(driver: Driver, probe: str) -> None:
    assert driver.call(Script(httpx.Response(200)), probe) is True
    assert driver.call(Script(httpx.Response(503)), probe) is False
    with pytest.raises(APIConnectionError):
        driver.call(Script(httpx.ConnectError("refused")), probe)


def test_version_and_metrics(driver: Driver) -> None:
    assert driver.call(Script(answer({"version": "1.2.3"})), "version").version == "1.2.3"
    assert driver.call(Script(httpx.Response(200, text="a 1\n")), "metrics") == "a 1\n"


def test_adapters_list_and_show_use_the_admin_key(driver: Driver) -> None:
    script = Script(answer({"object": "list", "data": [adapter_json()]}))
    (adapter,) = driver.call(script, "adapters.list")
    assert isinstance(adapter, Adapter)
    assert script.requests[0].headers["authorization"] == "Bearer admin-key"
    shown = driver.call(Script(answer(adapter_json(new_field="kept"))), "adapters.show", "pirate")
    assert (shown.residency, shown.ranks.max, shown.versions[1].current, shown.new_field) == ("gpu", 8, True, "kept")


def test_adapters_load(driver: Driver) -> None:
    script = Script(answer(adapter_json(), 201))
    driver.call(script, "adapters.load", "hf://org/pirate@v1", name="pirate", pinned=True)
    assert script.json() == {"name": "pirate", "source": "hf://org/pirate@v1", "replace": False, "pinned": True}


@pytest.mark.parametrize(
    ("method", "kwargs", "body"),
    [
        ("adapters.pin", {}, {"pinned": True}),
        ("adapters.unpin", {}, {"pinned": False}),
        ("adapters.update", {"version": 1}, {"version": 1}),
        ("adapters.update", {"alias": "p", "default_mode": "merged"}, {"alias": "p", "default_mode": "merged"}),
    ],
)
def test_adapters_update_sends_only_what_changes(
    driver: Driver, method: str, kwargs: dict[str, Any], body: dict[str, Any]
) -> None:
    script = Script(answer(adapter_json()))
    driver.call(script, method, "pirate", **kwargs)
    request = script.requests[0]
    assert (request.method, request.url.path, script.json()) == ("PATCH", "/v1/adapters/pirate", body)


def test_an_update_of_nothing_is_refused_here(driver: Driver) -> None:
    script = Script(answer(adapter_json()))
    with pytest.raises(ValueError, match="nothing to update"):
        driver.call(script, "adapters.update", "pirate")
    assert script.requests == []


@pytest.mark.parametrize("name", ["", " ", ".", ".."])
def test_a_name_that_would_change_the_route_is_refused_here(driver: Driver, name: str) -> None:
    script = Script(answer({}))
    with pytest.raises(ValueError, match="not a name"):
        driver.call(script, "adapters.delete", name)
    assert script.requests == []


def test_adapters_versions_and_delete(driver: Driver) -> None:
    versions = driver.call(Script(answer(adapter_json())), "adapters.versions", "pirate")
    assert [(version.version, version.current) for version in versions] == [(1, False), (2, True)]
    script = Script(answer({"object": "adapter.deleted", "name": "pirate", "deleted": True, "freed_bytes": 8192}))
    deleted = driver.call(script, "adapters.delete", "pirate")
    assert (deleted.deleted, deleted.freed_bytes) == (True, 8192)
    assert script.requests[0].method == "DELETE"
    with pytest.raises(NotFoundError):
        driver.call(Script(error_answer(404)), "adapters.show", "gone")


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"object": "chat.completion"}', b"\xff"])
def test_an_answer_of_the_wrong_shape_is_an_error(driver: Driver, content: bytes) -> None:
    with pytest.raises(ResponseFormatError, match="no ChatCompletion"):
        driver.call(Script(httpx.Response(200, content=content)), "chat", "hello", model="base")


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_BASE_URL", "http://elsewhere:9/v1/")
    monkeypatch.setenv("LORAPLEX_API_KEY", "user\n")
    monkeypatch.setenv("LORAPLEX_ADMIN_KEY", "admin")
    script = Script(answer({"version": "1", "data": []}))
    with Loraplex(transport=httpx.MockTransport(script)) as client:
        assert client.base_url == "http://elsewhere:9"
        client.version()
        client.adapters.list()
    assert [request.headers["authorization"] for request in script.requests] == ["Bearer user", "Bearer admin"]


def test_without_keys_no_authorization_is_sent() -> None:
    script = Script(answer({"data": []}))
    with Loraplex(transport=httpx.MockTransport(script)) as client:
        assert client.base_url == "http://127.0.0.1:8000"
        client.adapters.list()
    assert "authorization" not in script.requests[0].headers


def test_the_admin_key_stays_out_of_user_calls() -> None:
    script = Script(answer({"version": "1"}))
    with Loraplex(admin_key="admin", transport=httpx.MockTransport(script)) as client:
        client.version()
        assert "admin" not in repr(client._connection.endpoint)
    assert "authorization" not in script.requests[0].headers


def test_a_client_of_yours_stays_open() -> None:
    with httpx.Client(transport=httpx.MockTransport(Script(answer({"version": "1"})))) as http:
        with Loraplex(BASE_URL, http_client=http) as client:
            client.version()
        assert not http.is_closed


def public_methods(value: object) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in inspect.getmembers(value, callable)
        if not name.startswith("_") and not isinstance(member, type)
    }


@pytest.mark.parametrize("part", ["", "models", "adapters"])
def test_both_clients_have_the_same_surface(part: str) -> None:
    blocking: Any = Loraplex()
    awaited: Any = AsyncLoraplex()
    ours = public_methods(getattr(blocking, part) if part else blocking)
    theirs = public_methods(getattr(awaited, part) if part else awaited)
    theirs = {("close" if name == "aclose" else name): signature for name, signature in theirs.items()}
    assert ours.keys() == theirs.keys()
    for name, signature in ours.items():
        assert list(signature.parameters.values()) == list(theirs[name].parameters.values()), name
    blocking.close()
