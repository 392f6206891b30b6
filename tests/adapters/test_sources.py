"""P7: only allowed folders and the Hub are read; no other address is ever asked."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_adapters.errors import AdapterError, AdapterTooLarge, InvalidAdapter, SourceRefused, SourceUnavailable
from loraplex_adapters.sources import AdapterSources
from tests.adapters.making import CONFIG, WEIGHTS, save_random

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed root with one adapter in it."""
    root = tmp_path / "allowed"
    save_random(root / "mine")
    return root


@pytest.fixture
def into(tmp_path: Path) -> Path:
    into = tmp_path / "into"
    into.mkdir()
    return into


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "source",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://example.com/adapter.zip",
        "HTTP://example.com",
        "file:///etc/passwd",
        "s3://bucket/adapter",
        "gs://bucket/adapter",
        "ftp://example.com",
        "data:text/plain,x",
        "javascript:alert(1)",
        "hf:org/repo",
        "hf://",
        "hf://repo",
        "hf://org/repo/more",
        "hf://org/../repo",
        "hf://org/repo@",
        "hf://org/repo@../x",
        "hf://org/repo@a b",
        "hf://org/repo?x=1",
        "hf://user@host/repo",
        "hf://127.0.0.1:80/repo",
        "/etc",
        "/etc/passwd",
        "..",
        ".",
        "/proc/self/environ",
        "",
        "\0",
        "x" * 5000,
    ],
)
def test_other_addresses_and_places_are_refused(root: Path, into: Path, source: str) -> None:
    with pytest.raises(SourceRefused):
        AdapterSources((root,)).fetch(source, into)
    assert names(into) == []


def test_folders_below_a_root_are_copied(root: Path, into: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "tokenizer.json"):
        (root / "mine" / name).write_bytes(b"x")

    assert AdapterSources((root,)).fetch(str(root / "mine"), into) == str(root / "mine")

    assert names(into) == [CONFIG, WEIGHTS]
    assert (into / WEIGHTS).read_bytes() == (root / "mine" / WEIGHTS).read_bytes()
    assert not (into / WEIGHTS).is_symlink()


def test_archives_below_a_root_are_unpacked(root: Path, into: Path) -> None:
    import shutil

    shutil.make_archive(str(root / "packed"), "gztar", root, "mine")

    AdapterSources((root,)).fetch(str(root / "packed.tar.gz"), into)

    assert names(into) == [CONFIG, WEIGHTS]


def test_paths_cannot_leave_the_root(root: Path, tmp_path: Path, into: Path) -> None:
    secret = save_random(tmp_path / "secret")
    (root / "link").symlink_to(secret)
    sources = AdapterSources((root,))

    for path in (secret, root / ".." / "secret", root / "link", tmp_path / "allowed-too", root.parent):
        with pytest.raises(SourceRefused):
            sources.fetch(str(path), into)
    (root / "mine" / CONFIG).unlink()
    (root / "mine" / CONFIG).symlink_to(secret / CONFIG)
    with pytest.raises(SourceRefused):
        sources.fetch(str(root / "mine"), into)


def test_refusals_do_not_tell_what_exists(root: Path, into: Path) -> None:
    messages = set()
    for path in ("/etc/passwd", "/no/such/thing"):
        with pytest.raises(SourceRefused) as refusal:
            AdapterSources((root,)).fetch(path, into)
        messages.add(str(refusal.value))
    assert len(messages) == 1


def test_links_inside_the_root_are_followed(root: Path, into: Path) -> None:
    blobs = root / "blobs"
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        (root / "mine" / name).rename(blobs / name)
        (root / "mine" / name).symlink_to(blobs / name)

    AdapterSources((root,)).fetch(str(root / "mine"), into)

    assert names(into) == [CONFIG, WEIGHTS]


def test_without_roots_no_path_is_allowed_but_the_operators_own(root: Path, into: Path) -> None:
    with pytest.raises(SourceRefused):
        AdapterSources().fetch(str(root / "mine"), into)

    AdapterSources().fetch_trusted(root / "mine", into)
    assert names(into) == [CONFIG, WEIGHTS]


def test_unusable_paths_are_named(root: Path, into: Path) -> None:
    sources = AdapterSources((root,), max_bytes=1000)
    os.mkfifo(root / "pipe")
    (root / "pickled").mkdir()
    (root / "pickled" / "adapter_model.bin").write_bytes(b"x")
    (root / "half").mkdir()
    os.mkfifo(root / "half" / CONFIG)
    (root / "half" / WEIGHTS).write_bytes(b"x")

    for path, error, code in (
        ("missing", InvalidAdapter, "source_not_found"),
        ("pipe", InvalidAdapter, "source_not_found"),
        ("pickled", InvalidAdapter, "pickle_refused"),
        ("half", InvalidAdapter, "source_unreadable"),
        ("mine", AdapterTooLarge, "adapter_too_large"),
    ):
        with pytest.raises(error) as refusal:
            sources.fetch(str(root / path), into)
        assert refusal.value.code == code


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The two calls of the Hub that a download takes, for the repositories below ``folder``."""

    folder: Path
    seen_tokens: set[str | None]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.seen_tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/gated"):
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/org/down"):
            return self.answer(500, b"", {})
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if path == f"/api/models/{repo}/revision/nope":
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if not (self.folder / repo).is_dir():
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/"):
            files = [{"rfilename": f.name, "size": f.stat().st_size} for f in (self.folder / repo).iterdir()]
            body = json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files}).encode()
            return self.answer(200, body, {"Content-Type": "application/json"})
        assert f"/resolve/{COMMIT}/" in path
        content = (self.folder / repo / path.rsplit("/", 1)[1]).read_bytes()
        return self.answer(200, content, {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    save_random(tmp_path / "hub" / "org" / "lora")
    (tmp_path / "hub" / "org" / "lora" / "README.md").write_text("# Hub")
    (tmp_path / "hub" / "org" / "lora" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "hub" / "org" / "empty").mkdir()
    pickled = tmp_path / "hub" / "org" / "pickled"
    pickled.mkdir()
    (pickled / CONFIG).write_text("{}")
    (pickled / "adapter_model.bin").write_bytes(b"x")
    FakeHub.folder, FakeHub.seen_tokens = tmp_path / "hub", set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("source", ["hf://org/lora", "hf://org/lora@main"])
def test_hub_adapters_are_pinned_to_their_commit(hub: str, tmp_path: Path, into: Path, source: str) -> None:
    sources = AdapterSources(hub_token="hf_secret", hub_endpoint=hub)

    assert sources.fetch(source, into) == f"hf://org/lora@{COMMIT}"

    assert names(into) == ["README.md", CONFIG, WEIGHTS]
    assert (into / WEIGHTS).read_bytes() == (tmp_path / "hub" / "org" / "lora" / WEIGHTS).read_bytes()
    assert FakeHub.seen_tokens == {"Bearer hf_secret"}


def test_no_other_token_goes_to_the_hub(hub: str, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")

    AdapterSources(hub_endpoint=hub).fetch("hf://org/lora", into)

    assert FakeHub.seen_tokens == {None}


@pytest.mark.parametrize(
    ("source", "error", "code"),
    [
        ("hf://org/missing", SourceUnavailable, "source_not_found"),
        ("hf://org/lora@nope", SourceUnavailable, "source_not_found"),
        ("hf://org/gated", SourceUnavailable, "source_unavailable"),
        ("hf://org/down", SourceUnavailable, "source_unavailable"),
        ("hf://org/empty", InvalidAdapter, "adapter_config_missing"),
        ("hf://org/pickled", InvalidAdapter, "pickle_refused"),
    ],
)
def test_what_the_hub_does_not_deliver_is_named(
    hub: str, into: Path, source: str, error: type[AdapterError], code: str
) -> None:
    with pytest.raises(error) as refusal:
        AdapterSources(hub_token="hf_secret", hub_endpoint=hub).fetch(source, into)

    assert refusal.value.code == code
    assert "hf_secret" not in str(refusal.value)


def test_large_hub_adapters_are_refused_before_the_download(hub: str, into: Path) -> None:
    with pytest.raises(AdapterTooLarge):
        AdapterSources(hub_endpoint=hub, max_bytes=1000).fetch("hf://org/lora", into)
    assert names(into) == []


def test_an_unreachable_hub_is_named(into: Path) -> None:
    with pytest.raises(SourceUnavailable):
        AdapterSources(hub_endpoint="http://127.0.0.1:9").fetch("hf://org/lora", into)


def test_the_hub_can_be_closed(into: Path) -> None:
    with pytest.raises(SourceRefused, match="upload"):
        AdapterSources(allow_hub=False).fetch("hf://org/lora", into)
