from __future__ import annotations

import asyncio
import tracemalloc
from pathlib import Path

import httpx
import pytest

from loraplex_client import AsyncLoraplex, ConflictError, LocalAdapterError, Loraplex

from .drivers import Driver, Script, adapter_json, error_answer
from .servers import FakeServer

CREATED = httpx.Response(201, json=adapter_json())


def upload(server: FakeServer, kind: str, path: Path, **kwargs: object) -> str:
    if kind == "sync":
        with Loraplex(server.url) as client:
            return client.adapters.upload(path, **kwargs).name  # type: ignore[arg-type]

    async def main() -> str:
        async with AsyncLoraplex(server.url) as client:
            return (await client.adapters.upload(path, **kwargs)).name  # type: ignore[arg-type]

    return asyncio.run(main())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_directory_goes_as_its_config_weights_and_card(
    server: FakeServer, kind: str, adapter_directory: Path
) -> None:
    assert upload(server, kind, adapter_directory, name="parrot", pinned=True) == "parrot"
    weights = (adapter_directory / "adapter_model.safetensors").read_bytes()
    assert server.seen[-1].form == [
        ("name", None, b"parrot"),
        ("replace", None, b"false"),
        ("pinned", None, b"true"),
        ("files", "adapter_config.json", b'{"r": 8}'),
        ("files", "adapter_model.safetensors", weights),
        ("files", "README.md", b"card"),
    ]


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("file_name", ["parrot.tar.gz", "parrot.tgz", "parrot.tar", "parrot.ZIP"])
def test_an_archive_goes_as_it_is_under_its_own_name(
    server: FakeServer, kind: str, file_name: str, tmp_path: Path
) -> None:
    archive = tmp_path / file_name
    archive.write_bytes(b"archive")
    assert upload(server, kind, archive, replace=True) == "parrot"
    assert server.seen[-1].form == [
        ("name", None, b"parrot"),
        ("replace", None, b"true"),
        ("pinned", None, b"false"),
        ("file", file_name, b"archive"),
    ]


def test_a_directory_names_the_adapter(
    driver: Driver, adapter_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapter_directory)
    script = Script(CREATED)
    driver.call(script, "adapters.upload", ".")
    assert b'name="name"\r\n\r\npirate\r\n' in script.bodies[0]


def test_a_retry_sends_the_files_again(driver: Driver, adapter_directory: Path) -> None:
    script = Script(error_answer(503), CREATED)
    driver.call(script, "adapters.upload", adapter_directory)
    first, second = (body.partition(b"adapter_model.safetensors")[2][:1000] for body in script.bodies)
    assert b"weightsweights" in first
    assert b"weightsweights" in second
    assert len(script.bodies[0]) == len(script.bodies[1])


def test_large_files_are_not_read_into_memory(server: FakeServer, adapter_directory: Path) -> None:
    class Drain(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            assert isinstance(request.stream, httpx.SyncByteStream)
            size = sum(len(part) for part in request.stream)
            assert size == int(request.headers["content-length"])
            return CREATED

    with (adapter_directory / "adapter_model.safetensors").open("wb") as file:
        file.truncate(64 * 2**20)
    with Loraplex(transport=Drain()) as client:
        tracemalloc.start()
        client.adapters.upload(adapter_directory)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 4 * 2**20


def test_a_taken_name_is_a_conflict(server: FakeServer, adapter_directory: Path) -> None:
    with Loraplex(server.url) as client:
        with pytest.raises(ConflictError, match="taken") as caught:
            client.adapters.upload(adapter_directory)
        assert caught.value.code == "adapter_name_taken"
        assert client.adapters.upload(adapter_directory, replace=True).name == "pirate"
    assert len(server.seen) == 2


def test_what_is_no_adapter_is_refused_before_anything_is_sent(driver: Driver, tmp_path: Path) -> None:
    script = Script(CREATED)
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text("{}")
    (pickled / "adapter_model.bin").write_bytes(b"pickle")
    lone = tmp_path / "adapter_model.safetensors"
    lone.write_bytes(b"weights")
    for path, reason in [
        (tmp_path / "missing", "does not exist"),
        (empty, r"holds no adapter_config\.json"),
        (pickled, r"holds no adapter_model\.safetensors"),
        (lone, "neither an adapter's directory nor an archive"),
    ]:
        with pytest.raises(LocalAdapterError, match=reason):
            driver.call(script, "adapters.upload", path, name="x")
    assert script.requests == []


def test_a_file_that_cannot_be_read_is_refused(
    driver: Driver, adapter_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_args: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(LocalAdapterError, match=r"adapter_config\.json: Permission denied"):
        driver.call(Script(CREATED), "adapters.upload", adapter_directory)
