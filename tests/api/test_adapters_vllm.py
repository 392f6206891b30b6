"""vLLM's load and unload calls, as its tools make them."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loraplex_server.model.decoder import Decoder
from tests.api.live import files_below, live_server, save_adapter


@pytest.fixture
def poet(tmp_path: Path, decoder: Decoder) -> Path:
    return save_adapter(tmp_path / "sources" / "poet", decoder.base_shape, seed=1)


@pytest.fixture
def http(tmp_path: Path, decoder: Decoder) -> Iterator[httpx.Client]:
    root = tmp_path / "sources"
    with live_server(tmp_path / "data", decoder, roots=(root,)) as server, server.http() as http:
        yield http


def load(http: httpx.Client, name: str, path: Path | str, **more: object) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def unload(http: httpx.Client, name: str, **more: object) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name, **more})


def test_load_use_unload(http: httpx.Client, poet: Path, tmp_path: Path) -> None:
    loaded = load(http, "poet", poet)
    assert loaded.status_code == 200
    assert loaded.headers["content-type"].startswith("text/plain")
    assert loaded.text == "Success: LoRA adapter 'poet' added successfully."

    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert cards["poet"]["root"] == str(poet)
    assert cards["poet"]["parent"] == "tiny"
    body = {"model": "poet", "prompt": "hello", "max_tokens": 4}
    assert http.post("/v1/completions", json=body).status_code == 200

    unloaded = unload(http, "poet", lora_int_id=1)
    assert unloaded.status_code == 200
    assert unloaded.text == "Success: LoRA adapter 'poet' removed successfully."
    assert http.post("/v1/completions", json=body).status_code == 404
    assert files_below(tmp_path / "data") == set()


def test_a_loaded_name_needs_load_inplace(http: httpx.Client, poet: Path, decoder: Decoder) -> None:
    load(http, "poet", poet)
    again = load(http, "poet", poet)
    assert again.status_code == 400
    assert "load_inplace" in again.json()["error"]["message"]
    save_adapter(poet, decoder.base_shape, seed=2)
    assert load(http, "poet", poet, load_inplace=True).status_code == 200
    assert http.get("/v1/adapters/poet").json()["version"] == 2


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("poet", "/etc"),
        ("poet", "/nowhere"),
        ("poet", "org/repo"),
        ("poet", "http://host/x"),
        ("a b", "/etc"),
        ("", "/x"),
    ],
)
def test_a_user_s_mistake_is_a_400(http: httpx.Client, name: str, path: str) -> None:
    answer = load(http, name, path)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_broken_adapter_is_a_400(http: httpx.Client, poet: Path, tmp_path: Path) -> None:
    (poet / "adapter_config.json").write_text("{}")
    assert load(http, "poet", poet).status_code == 400
    assert files_below(tmp_path / "data") == set()


def test_missing_and_unknown_fields(http: httpx.Client) -> None:
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "x"}).status_code == 400
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "y", "z": 1}).status_code == 400
    assert http.post("/v1/unload_lora_adapter", json={}).status_code == 400


def test_unloading_what_is_not_there_is_a_404(http: httpx.Client, poet: Path) -> None:
    load(http, "poet", poet)
    assert unload(http, "nobody").status_code == 404
    assert unload(http, "poet@1").status_code == 404
    assert http.get("/v1/adapters/poet").status_code == 200
