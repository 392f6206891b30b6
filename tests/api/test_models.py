"""Models, tokens, health and the schema."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from urllib.parse import quote

import openai
import pytest

from loraplex_server.engine.messages import AdapterState, EngineStats
from tests.api.servers import Server, scripted_services, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    services = scripted_services(tmp_path_factory.mktemp("models"), adapters=("poet", "ft:base:org:coder", "org/name"))
    services.registry.update("poet", alias="bard")
    with serve(services) as server:
        yield server


def test_the_list_has_the_base_and_its_children(server: Server) -> None:
    models = list(server.openai().models.list())
    assert [model.id for model in models] == ["base-model", "base-alias", "ft:base:org:coder", "org/name", "poet"]
    assert {model.object for model in models} == {"model"}


def test_an_adapters_card_says_what_it_is(server: Server) -> None:
    digest = "00" * 32
    server.worker.stats = EngineStats(adapters={digest: AdapterState("gpu", 100)})
    with server.http() as http:
        card = http.get("/v1/models/poet").json()
    assert (card["parent"], card["owned_by"], card["max_model_len"]) == ("base-model", "loraplex", 512)
    assert card["loraplex"] == {"digest": digest, "version": 1, "rank": 16, "mode": "auto", "residency": "gpu"}


@pytest.mark.parametrize("name", ["base-model", "poet", "bard", "poet@1", "ft:base:org:coder", "org/name"])
def test_a_model_is_found_by_every_name(server: Server, name: str) -> None:
    with server.http() as http:
        for spelled in (name, quote(name, safe="")):
            response = http.get(f"/v1/models/{spelled}")
            assert response.status_code == 200
            assert response.json()["id"] in (name, "poet")


def test_an_unknown_model_is_a_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai().models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_tokens_of_a_prompt_and_back(server: Server) -> None:
    with server.http() as http:
        body = http.post("/tokenize", json={"prompt": "hé", "model": "poet"}).json()
        assert body == {"count": 3, "max_model_len": 512, "tokens": [104, 195, 169], "token_strs": None}
        strings = http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()["token_strs"]
        assert strings == ["a", "b"]
        assert http.post("/detokenize", json={"tokens": [104, 195, 169, 257]}).json() == {"prompt": "hé<|eos|>"}


def test_tokens_of_a_conversation(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with server.http() as http:
        rendered = []
        for extra in ({}, {"add_generation_prompt": False}):
            tokens = http.post("/tokenize", json={"messages": messages, **extra}).json()["tokens"]
            rendered.append(http.post("/detokenize", json={"tokens": tokens}).json()["prompt"])
    assert rendered == ["<|bos|>user: Hi<|turn|>assistant: ", "<|bos|>user: Hi<|turn|>"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400),
        ("/tokenize", {"prompt": "a", "other": 1}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [320]}, 400),
        ("/detokenize", {"tokens": "a"}, 400),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404),
    ],
)
def test_token_bodies_are_checked(server: Server, path: str, body: dict[str, object], status: int) -> None:
    with server.http() as http:
        response = http.post(path, json=body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_health_ready_and_version(server: Server) -> None:
    with server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/version").json() == {"version": version("loraplex")}


def test_the_schema_names_every_route_and_bound(server: Server) -> None:
    with server.http() as http:
        schema = http.get("/openapi.json").json()
        assert "swagger" in http.get("/docs").text
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/health"} <= set(schema["paths"])
    assert '"maximum": 16' in json.dumps(schema["components"]["schemas"]["ChatRequest"]["properties"]["n"])
