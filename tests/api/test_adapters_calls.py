"""The admin calls as their users see them: add, show, change, delete."""

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from loraplex_server.auth import Keys
from loraplex_server.model.decoder import Decoder
from tests.api.live import files_below, live_server, save_adapter, tarred, zipped
from tests.api.servers import Server, wait_until


@pytest.fixture
def poet(tmp_path: Path, decoder: Decoder) -> Path:
    return save_adapter(tmp_path / "sources" / "poet", decoder.base_shape, seed=1)


@pytest.fixture
def other(tmp_path: Path, decoder: Decoder) -> Path:
    return save_adapter(tmp_path / "sources" / "other", decoder.base_shape, seed=2, rank=2)


@pytest.fixture
def server(tmp_path: Path, decoder: Decoder) -> Iterator[Server]:
    with live_server(tmp_path / "data", decoder, roots=(tmp_path / "sources",)) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def upload(http: httpx.Client, name: str, content: bytes, **fields: str) -> httpx.Response:
    file = ("adapter.zip", io.BytesIO(content), "application/zip")
    return http.post("/v1/adapters", data={"name": name, **fields}, files={"file": file})


def complete(http: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "hello", "max_tokens": 6, "temperature": 0, **fields}
    return http.post("/v1/completions", json=body)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_an_uploaded_adapter_is_described_and_answers(http: httpx.Client, poet: Path) -> None:
    created = upload(http, "poet", zipped(poet))
    assert created.status_code == 201
    assert created.headers["location"] == "/v1/adapters/poet"
    adapter = created.json()
    assert adapter["name"] == "poet"
    assert adapter["object"] == "adapter"
    assert adapter["base"] == "tiny"
    assert adapter["version"] == 1
    assert adapter["rank"] == 4
    assert adapter["ranks"] == {"min": 4, "max": 4}
    assert len(adapter["target_modules"]) == 7
    assert adapter["num_parameters"] * 4 == adapter["num_bytes"]
    assert adapter["residency"] == "disk"
    assert adapter["pinned"] is False
    assert adapter["source"] == "upload"
    assert adapter["aliases"] == []
    assert [version["current"] for version in adapter["versions"]] == [True]

    assert text_of(complete(http, "poet")) != text_of(complete(http, "tiny"))
    shown = http.get("/v1/adapters/poet").json()
    assert shown["residency"] == "gpu"
    assert http.get("/v1/adapters").json() == {"object": "list", "data": [shown]}


@pytest.mark.parametrize("pack", [zipped, tarred, lambda folder: tarred(folder, "w")], ids=["zip", "tar.gz", "tar"])
def test_every_kind_of_archive(http: httpx.Client, poet: Path, pack: Any) -> None:
    assert upload(http, "poet", pack(poet)).status_code == 201


def test_several_files(http: httpx.Client, poet: Path) -> None:
    files = [("files", (path.name, path.read_bytes())) for path in poet.iterdir()]
    assert http.post("/v1/adapters", data={"name": "poet"}, files=files).status_code == 201


def test_the_same_content_again_is_the_same_adapter(http: httpx.Client, poet: Path) -> None:
    first = upload(http, "poet", zipped(poet))
    again = upload(http, "poet", tarred(poet))
    assert again.status_code == 200
    assert again.json()["digest"] == first.json()["digest"]
    assert len(again.json()["versions"]) == 1


def test_a_taken_name_is_kept_unless_replaced(http: httpx.Client, poet: Path, other: Path) -> None:
    upload(http, "poet", zipped(poet))
    before = text_of(complete(http, "poet"))
    assert error_of(upload(http, "poet", zipped(other)), 409)["code"] == "adapter_name_taken"
    assert text_of(complete(http, "poet")) == before

    replaced = upload(http, "poet", zipped(other), replace="true")
    assert replaced.status_code == 201
    assert replaced.json()["version"] == 2
    assert text_of(complete(http, "poet")) != before

    versions = http.get("/v1/adapters/poet/versions").json()["data"]
    assert [(version["version"], version["current"]) for version in versions] == [(1, False), (2, True)]
    assert http.patch("/v1/adapters/poet", json={"version": 1}).json()["version"] == 1
    assert text_of(complete(http, "poet")) == before
    assert text_of(complete(http, "poet@1")) == before


def test_the_base_s_name_is_taken(http: httpx.Client, poet: Path) -> None:
    error_of(upload(http, "tiny", zipped(poet)), 409)


@pytest.mark.parametrize("name", ["ft:tiny:org:suffix:id", "org/name", "org/versions.v2"])
def test_names_with_colons_and_slashes(http: httpx.Client, poet: Path, name: str) -> None:
    assert upload(http, name, zipped(poet)).status_code == 201
    for path in (name, quote(name, safe="")):
        assert http.get(f"/v1/adapters/{path}").json()["name"] == name
        assert len(http.get(f"/v1/adapters/{path}/versions").json()["data"]) == 1
    text_of(complete(http, name))
    assert http.patch(f"/v1/adapters/{quote(name, safe='')}", json={"alias": "short"}).status_code == 200
    assert http.delete(f"/v1/adapters/{quote(name, safe='')}").status_code == 200
    assert http.get("/v1/adapters").json()["data"] == []


def test_a_source_below_an_allowed_root(http: httpx.Client, poet: Path) -> None:
    created = http.post("/v1/adapters", json={"name": "poet", "source": str(poet), "pinned": True})
    assert created.status_code == 201
    assert created.json()["source"] == str(poet)
    assert created.json()["pinned"] is True


def test_a_pinned_adapter_is_warmed_and_guarded(http: httpx.Client, poet: Path) -> None:
    upload(http, "poet", zipped(poet), pinned="true")
    wait_until(lambda: http.get("/v1/adapters/poet").json()["residency"] == "gpu")
    assert error_of(http.delete("/v1/adapters/poet"), 409)["code"] == "adapter_pinned"
    assert http.patch("/v1/adapters/poet", json={"pinned": False}).json()["pinned"] is False
    assert http.delete("/v1/adapters/poet").status_code == 200


def test_warm_brings_an_adapter_to_the_device(http: httpx.Client, poet: Path) -> None:
    upload(http, "poet", zipped(poet), warm="1")
    wait_until(lambda: http.get("/v1/adapters/poet").json()["residency"] == "gpu")
    assert http.get("/v1/adapters/poet").json()["pinned"] is False


def test_an_alias_answers_and_is_dropped_alone(http: httpx.Client, poet: Path, other: Path) -> None:
    upload(http, "poet", zipped(poet))
    upload(http, "other", zipped(other))
    assert http.patch("/v1/adapters/poet", json={"alias": "bard"}).json()["aliases"] == ["bard"]
    assert text_of(complete(http, "bard")) == text_of(complete(http, "poet"))
    error_of(http.patch("/v1/adapters/other", json={"alias": "bard"}), 409)
    error_of(http.patch("/v1/adapters/other", json={"alias": "poet"}), 409)
    assert http.delete("/v1/adapters/bard").json()["name"] == "bard"
    assert http.get("/v1/adapters/poet").json()["aliases"] == []


def test_unload_gives_memory_and_disk_back(http: httpx.Client, poet: Path, tmp_path: Path) -> None:
    digest = upload(http, "poet", zipped(poet)).json()["digest"]
    complete(http, "poet")
    deleted = http.delete("/v1/adapters/poet")
    assert deleted.status_code == 200
    freed = deleted.json()
    assert freed.pop("freed_bytes") > 0
    assert freed == {"object": "adapter.deleted", "name": "poet", "deleted": True, "digest": digest}
    assert files_below(tmp_path / "data") == set()
    error_of(http.get("/v1/adapters/poet"), 404)
    error_of(complete(http, "poet"), 404)
    error_of(http.delete("/v1/adapters/poet"), 404)


def test_content_under_another_name_stays(http: httpx.Client, poet: Path) -> None:
    upload(http, "one", zipped(poet))
    upload(http, "two", zipped(poet))
    before = text_of(complete(http, "two"))
    assert http.delete("/v1/adapters/one").json()["freed_bytes"] == 0
    assert text_of(complete(http, "two")) == before


def test_unload_waits_for_its_users(http: httpx.Client, server: Server, poet: Path) -> None:
    """A stream with several choices runs to its end; the delete answers after it, and the memory is back."""
    upload(http, "poet", zipped(poet))
    expected = text_of(complete(http, "poet", max_tokens=300))
    body = {"model": "poet", "prompt": "hello", "max_tokens": 300, "temperature": 0, "stream": True, "n": 2}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        wait_until(lambda: http.get("/v1/adapters/poet").json()["requests_running"] > 0)
        early = http.delete("/v1/adapters/poet", params={"timeout": 0})
        assert early.status_code == 202
        assert early.json()["state"] == "draining"
        error_of(complete(http, "poet"), 404)
        pieces = {0: "", 1: ""}
        for line in lines:
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    pieces[choice["index"]] += choice["text"]
    assert all(expected.endswith(text) and len(text) > len(expected) // 2 for text in pieces.values())
    wait_until(lambda: server.worker.stats.adapter_bytes_used == 0 and not server.worker.stats.adapters)


def test_a_delete_answers_after_the_last_request(http: httpx.Client, server: Server, poet: Path) -> None:
    upload(http, "poet", zipped(poet))
    answers: list[str] = []
    with server.http() as reader:
        thread = threading.Thread(target=lambda: answers.append(text_of(complete(reader, "poet", max_tokens=300))))
        thread.start()
        wait_until(lambda: server.worker.stats.num_running > 0)
        deleted = http.delete("/v1/adapters/poet")
        assert deleted.json()["freed_bytes"] > 0
        thread.join(20)
    assert len(answers) == 1
    assert server.worker.stats.adapter_bytes_used == 0


def test_a_request_sees_one_version_through_swaps(http: httpx.Client, server: Server, poet: Path, other: Path) -> None:
    upload(http, "poet", zipped(poet))
    answers_of = {text_of(complete(http, "poet", max_tokens=24))}
    upload(http, "poet", zipped(other), replace="true")
    answers_of.add(text_of(complete(http, "poet", max_tokens=24)))
    stop, seen = threading.Event(), set()

    def ask() -> None:
        with server.http() as reader:
            while not stop.is_set():
                seen.add(text_of(complete(reader, "poet", max_tokens=24)))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for swap in range(20):
        assert http.patch("/v1/adapters/poet", json={"version": 1 + swap % 2}).status_code == 200
    stop.set()
    for thread in threads:
        thread.join(20)
    assert len(answers_of) == 2
    assert seen <= answers_of


def test_names_survive_a_restart(tmp_path: Path, decoder: Decoder, poet: Path) -> None:
    with live_server(tmp_path / "data", decoder) as server, server.http() as http:
        upload(http, "poet", zipped(poet), pinned="true")
        before = text_of(complete(http, "poet"))
    with live_server(tmp_path / "data", decoder) as server, server.http() as http:
        assert http.get("/v1/adapters/poet").json()["pinned"] is True
        assert text_of(complete(http, "poet")) == before


def test_admin_calls_need_the_admin_key(tmp_path: Path, decoder: Decoder) -> None:
    calls = [
        ("GET", "/v1/adapters"),
        ("POST", "/v1/adapters"),
        ("GET", "/v1/adapters/x"),
        ("PATCH", "/v1/adapters/x"),
        ("DELETE", "/v1/adapters/x"),
        ("GET", "/v1/adapters/x/versions"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/flush_cache"),
    ]
    with live_server(tmp_path, decoder, keys=Keys(user=("user",), admin=("admin",))) as server, server.http() as http:
        for method, path in calls:
            for key, refused in (("", {401}), ("wrong", {401}), ("user", {403})):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                assert http.request(method, path, headers=headers).status_code in refused, (method, path, key)
            answer = http.request(method, path, headers={"authorization": "Bearer admin"})
            assert answer.status_code not in (401, 403), (method, path)
