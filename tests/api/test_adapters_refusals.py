"""Bad uploads over HTTP: an answer with the reason, nothing left on disk, and running requests unharmed."""

import io
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from loraplex_adapters.base import BaseShape
from loraplex_server.model.decoder import Decoder
from tests.adapters.making import CONFIG, WEIGHTS, edit_config, edit_tensors, tensor_name
from tests.api.live import files_below, live_server, save_adapter, zipped
from tests.api.servers import Server, wait_until
from tests.models import make_checkpoint

MAX_BYTES = 4 << 20

Spoil = Callable[[Path], bytes]


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture
def server(tmp_path: Path, decoder: Decoder) -> Iterator[Server]:
    with live_server(tmp_path / "data", decoder, max_bytes=MAX_BYTES, roots=(tmp_path / "allowed",)) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


@pytest.fixture
def adapter(tmp_path: Path, decoder: Decoder) -> Path:
    return save_adapter(tmp_path / "adapter", decoder.base_shape)


def upload(http: httpx.Client, content: bytes, **fields: str) -> httpx.Response:
    return http.post(
        "/v1/adapters", data={"name": "bad", **fields}, files={"file": ("adapter.zip", io.BytesIO(content))}
    )


def refused(response: httpx.Response, status: int, code: str | None = None) -> str:
    """The message of an OpenAI error body of this status."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code
    return str(error["message"])


def nothing_left(tmp_path: Path, http: httpx.Client) -> None:
    assert files_below(tmp_path / "data") == set()
    assert http.get("/v1/adapters").json()["data"] == []


def _zip(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def _link(kind: bytes) -> bytes:
    info = tarfile.TarInfo(WEIGHTS)
    info.type, info.linkname = kind, "/etc/passwd"
    return _tar((info, b""))


def _without_config(folder: Path) -> bytes:
    (folder / CONFIG).unlink()
    return zipped(folder)


def _without_weights(folder: Path) -> bytes:
    (folder / WEIGHTS).unlink()
    return zipped(folder)


def _truncated(folder: Path) -> bytes:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    return zipped(folder)


def _tensors(name: str, tensor: torch.Tensor) -> Spoil:
    return lambda folder: zipped(edit_tensors(folder, {name: tensor}))


A = tensor_name(0, "q_proj", "A")

CASES: dict[str, tuple[int, Spoil]] = {
    "wrong shapes": (422, _tensors(A, torch.zeros(4, 65))),
    "no such module": (
        422,
        _tensors("base_model.model.model.layers.0.self_attn.zzz_proj.lora_A.weight", torch.zeros(4, 64)),
    ),
    "no such layer": (422, _tensors(tensor_name(99, "q_proj", "A"), torch.zeros(4, 64))),
    "NaN": (422, _tensors(A, torch.full((4, 64), float("nan")))),
    "missing config": (422, _without_config),
    "missing weights": (422, _without_weights),
    "truncated weights": (422, _truncated),
    "config is no JSON": (422, lambda folder: _zip({CONFIG: b"{", WEIGHTS: (folder / WEIGHTS).read_bytes()})),
    "not LoRA": (422, lambda folder: zipped(edit_config(folder, peft_type="IA3"))),
    "DoRA": (422, lambda folder: zipped(edit_config(folder, use_dora=True))),
    "huge rank": (422, lambda folder: zipped(edit_config(folder, r=10**9))),
    "path with ..": (422, lambda folder: _zip({f"../{WEIGHTS}": b"x"})),
    "absolute path": (422, lambda folder: _tar((tarfile.TarInfo("/etc/x"), b"x"))),
    "symbolic link": (422, lambda folder: _link(tarfile.SYMTYPE)),
    "hard link": (422, lambda folder: _link(tarfile.LNKTYPE)),
    "device": (422, lambda folder: _link(tarfile.CHRTYPE)),
    "1000:1 compression": (422, lambda folder: _zip({WEIGHTS: bytes(MAX_BYTES - 1000)})),
    "unpacks beyond the cap": (
        413,
        lambda folder: _zip({f"{i}.txt": os.urandom(1 << 20) for i in range(4)} | {"z": bytes(2 << 20)}),
    ),
    "too many files": (413, lambda folder: _zip({f"{i}": b"" for i in range(1001)})),
    "no archive": (422, lambda folder: b"hello"),
    "an empty file": (422, lambda folder: b""),
    "damaged archive": (422, lambda folder: zipped(folder)[:-50]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_upload_is_refused_with_its_reason(case: str, http: httpx.Client, adapter: Path, tmp_path: Path) -> None:
    status, spoil = CASES[case]
    assert len(refused(upload(http, spoil(adapter)), status)) > 20
    nothing_left(tmp_path, http)


def test_an_adapter_for_another_base(http: httpx.Client, tmp_path: Path, decoder: Decoder) -> None:
    shape = decoder.base_shape
    wider = {name: (n, k + 64 * (name != "down_proj")) for name, (n, k) in shape.linears.items()}
    larger = BaseShape(shape.model_type, shape.num_layers, wider, shape.vocab_size, shape.hidden_size, "f" * 64)
    refused(upload(http, zipped(save_adapter(tmp_path / "wider", larger))), 422)
    nothing_left(tmp_path, http)


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "adapter.pt", "data.pkl"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_pickle_is_never_opened(http: httpx.Client, adapter: Path, tmp_path: Path, name: str, packed: bool) -> None:
    canary = tmp_path / "canary"
    (adapter / name).write_bytes(pickle.dumps(Canary(canary)))
    if packed:
        answer = upload(http, zipped(adapter))
    else:
        files = [("files", (path.name, path.read_bytes())) for path in adapter.iterdir()]
        answer = http.post("/v1/adapters", data={"name": "bad"}, files=files)
    refused(answer, 422, "pickle_refused")
    assert not canary.exists()
    nothing_left(tmp_path, http)


def test_a_torch_checkpoint_as_the_archive(http: httpx.Client, tmp_path: Path) -> None:
    checkpoint = io.BytesIO()
    torch.save({"canary": torch.zeros(2)}, checkpoint)
    assert upload(http, checkpoint.getvalue()).status_code in (413, 422)
    nothing_left(tmp_path, http)


def test_a_declared_gigabyte_is_refused_before_it_is_sent(http: httpx.Client, tmp_path: Path) -> None:
    headers = {"content-length": str(1 << 30), "content-type": "multipart/form-data; boundary=b"}
    request = http.build_request("POST", "/v1/adapters", headers=headers, content=iter(()))
    assert _raw_status(http, request) == 413
    nothing_left(tmp_path, http)


def _raw_status(http: httpx.Client, request: httpx.Request) -> int:
    """Send the head alone and read the status line."""
    head = f"{request.method} {request.url.path} HTTP/1.1\r\nhost: {request.url.netloc.decode()}\r\n"
    head += "".join(f"{name}: {request.headers[name]}\r\n" for name in ("content-length", "content-type"))
    with socket.create_connection((request.url.host, request.url.port or 80), timeout=10) as connection:
        connection.sendall(f"{head}\r\n".encode())
        return int(connection.recv(4096).split()[1])


def test_an_undeclared_gigabyte_ends_early_and_is_not_kept(
    server: Server, http: httpx.Client, adapter: Path, tmp_path: Path
) -> None:
    """1 GiB without a content-length, while another request runs: 413, memory and disk as before, the request right."""
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 300, "temperature": 0}
    expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
    chunk = bytes(1 << 20)
    largest = 0

    def gigabyte() -> Iterator[bytes]:
        nonlocal largest
        yield head
        for _ in range(1 << 10):
            kept = sum(path.stat().st_size for path in (tmp_path / "data" / "store").rglob("*") if path.is_file())
            largest = max(largest, kept)
            yield chunk

    answers: list[str] = []

    def ask() -> None:
        with server.http() as reader:
            answers.append(reader.post("/v1/completions", json=body).json()["choices"][0]["text"])

    thread = threading.Thread(target=ask)
    thread.start()
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = http.post("/v1/adapters", content=gigabyte(), headers=headers)
    thread.join(30)
    refused(answer, 413, "adapter_too_large")
    assert largest <= MAX_BYTES + (2 << 20)
    assert answers == [expected]
    nothing_left(tmp_path, http)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"garbage"),
        ("multipart/form-data; boundary=b", b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\nx'),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"x: y\r\n" * 1000 + b"\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"x" * 100_000),
        ("application/json", b"{"),
        ("application/json", b"[]"),
        ("application/json", b"null"),
        ("application/json", b""),
        ("application/json", b'{"name": "x"}'),
        ("application/json", b'{"name": "x", "source": "y", "sauce": 1}'),
        ("application/json", b'{"name": "x", "source": "y", "merge": {"precision": "nf4"}}'),
        ("application/json", b'{"name": 5, "source": "y"}'),
        ("application/json", b'{"name": "x", "source": "y", "pinned": "perhaps"}'),
    ],
)
def test_a_broken_body(http: httpx.Client, tmp_path: Path, content_type: str, body: bytes) -> None:
    refused(http.post("/v1/adapters", content=body, headers={"content-type": content_type}), 400)
    nothing_left(tmp_path, http)


def test_other_bodies(http: httpx.Client) -> None:
    refused(http.post("/v1/adapters", content=b"x", headers={"content-type": "text/plain"}), 415)
    refused(http.post("/v1/adapters", json={"name": "x", "source": "y" * 70_000}), 413, "body_too_large")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": ""}, "name"),
        ({"merge": "nf4"}, "merge"),
        ({"pined": "1"}, "pined"),
        ({"pinned": "perhaps"}, "pinned"),
        ({"replace": "x" * 5000}, "replace"),
    ],
)
def test_form_fields_are_checked(
    http: httpx.Client, adapter: Path, tmp_path: Path, fields: dict[str, str], param: str
) -> None:
    answer = upload(http, zipped(adapter), **fields)
    refused(answer, 400)
    assert answer.json()["error"]["param"] == param
    nothing_left(tmp_path, http)


def test_a_form_needs_a_name_and_a_file(http: httpx.Client, adapter: Path, tmp_path: Path) -> None:
    refused(http.post("/v1/adapters", files={"file": ("a.zip", zipped(adapter))}), 400, "missing_field")
    refused(http.post("/v1/adapters", files={"name": (None, "x")}), 400, "missing_field")
    twice = [("name", (None, "a")), ("name", (None, "b")), ("file", ("a.zip", zipped(adapter)))]
    refused(http.post("/v1/adapters", files=twice), 400)
    refused(http.post("/v1/adapters", data={"name": "x"}, files={"weights": ("a.zip", b"x")}), 400, "unknown_field")
    nothing_left(tmp_path, http)


@pytest.mark.parametrize("name", ["../x", "a b", "a//b", "/x", "x/../y", "a@b", "ü", "x" * 129])
def test_bad_names(http: httpx.Client, adapter: Path, tmp_path: Path, name: str) -> None:
    refused(upload(http, zipped(adapter), name=name), 422, "adapter_name_invalid")
    nothing_left(tmp_path, http)


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/abs/adapter_config.json", "a\\b", "a:b"])
def test_bad_file_names(http: httpx.Client, tmp_path: Path, name: str) -> None:
    files = [("files", (name, b"{}")), ("files", (WEIGHTS, b"x"))]
    refused(http.post("/v1/adapters", data={"name": "bad"}, files=files), 422)
    nothing_left(tmp_path, http)


@pytest.mark.parametrize(
    "source",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.com/adapter.zip",
        "file:///etc/passwd",
        "s3://bucket/adapter",
        "hf://org/repo",
        "/etc",
        "/etc/passwd",
        "../../etc",
        "~/adapter",
    ],
)
def test_sources_outside_are_refused(http: httpx.Client, tmp_path: Path, source: str) -> None:
    refused(http.post("/v1/adapters", json={"name": "bad", "source": source}), 403, "source_refused")
    nothing_left(tmp_path, http)


def test_a_link_out_of_an_allowed_root(http: httpx.Client, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "way-out").symlink_to(adapter)
    source = str(tmp_path / "allowed" / "way-out")
    refused(http.post("/v1/adapters", json={"name": "bad", "source": source}), 403)
    nothing_left(tmp_path, http)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 400),
        ({"pinned": None}, 400),
        ({"default_mode": "merged"}, 400),
        ({"default_mode": "fast"}, 400),
        ({"version": 0}, 400),
        ({"version": 2}, 404),
        ({"alias": "a b"}, 422),
        ({"alias": "tiny"}, 409),
        ({"name": "other"}, 400),
    ],
)
def test_bad_changes(http: httpx.Client, adapter: Path, change: dict[str, Any], status: int) -> None:
    upload(http, zipped(adapter), name="good")
    before = http.get("/v1/adapters/good").json()
    refused(http.patch("/v1/adapters/good", json=change), status)
    assert http.get("/v1/adapters/good").json() == before


def test_unknown_adapters(http: httpx.Client) -> None:
    refused(http.get("/v1/adapters/nobody"), 404, "adapter_not_found")
    refused(http.get("/v1/adapters/nobody/versions"), 404)
    refused(http.patch("/v1/adapters/nobody", json={"pinned": True}), 404)
    refused(http.delete("/v1/adapters/nobody"), 404)


def test_a_version_alone_is_not_deleted(http: httpx.Client, adapter: Path) -> None:
    upload(http, zipped(adapter), name="good")
    refused(http.delete("/v1/adapters/good@1"), 400)
    refused(http.delete("/v1/adapters/good", params={"timeout": "-1"}), 400)
    assert http.get("/v1/adapters/good").status_code == 200


def test_a_client_that_leaves_in_mid_upload(server: Server, http: httpx.Client, tmp_path: Path) -> None:
    head = b"POST /v1/adapters HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 3000000\r\n"
    head += b"content-type: multipart/form-data; boundary=b\r\n\r\n"
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + part + bytes(2 << 20))
        wait_until(lambda: files_below(tmp_path / "data") != set())
    wait_until(lambda: files_below(tmp_path / "data") == set())
    nothing_left(tmp_path, http)


_KILLED_SERVER = """
import sys
from pathlib import Path
import torch, uvicorn
from loraplex_server.app import create_app
from loraplex_server.model.loader import load
from tests.api.live import live_services

data, checkpoint, port_file = map(Path, sys.argv[1:])
decoder = load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
server = uvicorn.Server(uvicorn.Config(create_app(live_services(data, decoder)), port=0, log_level="warning"))
started = server.startup

async def startup(sockets=None):
    await started(sockets)
    port_file.write_text(str(server.servers[0].sockets[0].getsockname()[1]))

server.startup = startup
server.run()
"""


@pytest.mark.e2e
def test_killed_in_mid_upload_the_old_state_is_intact(tmp_path: Path, decoder: Decoder, adapter: Path) -> None:
    checkpoint, port_file = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "port"
    command = [sys.executable, "-c", _KILLED_SERVER, str(tmp_path / "data"), str(checkpoint), str(port_file)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        wait_until(lambda: process.poll() is not None or (port_file.exists() and port_file.read_text()), 60)
        url = f"http://127.0.0.1:{port_file.read_text()}"
        with httpx.Client(base_url=url, timeout=20, trust_env=False) as http:
            digest = upload(http, zipped(adapter), name="old").json()["digest"]
            threading.Thread(target=_upload_forever, args=(url,), daemon=True).start()
            wait_until(lambda: any(path.suffix == ".part" for path in (tmp_path / "data/store/incoming").rglob("*")))
            os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    with live_server(tmp_path / "data", decoder) as server, server.http() as http:
        assert [(found["name"], found["digest"]) for found in http.get("/v1/adapters").json()["data"]] == [
            ("old", digest)
        ]
        stored = {name for name in files_below(tmp_path / "data") if name.count("/") == 1}
        assert stored == {f"adapters/{digest}"}
        body = {"model": "old", "prompt": "hello", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200


def _upload_forever(url: str) -> None:
    def body() -> Iterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
        while True:
            yield bytes(1 << 10)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    try:
        httpx.post(f"{url}/v1/adapters", content=body(), headers=headers, trust_env=False)
    except httpx.TransportError:
        return


def test_a_full_disk_is_told_before_the_upload(
    http: httpx.Client, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    refused(upload(http, zipped(adapter)), 507, "store_full")
    nothing_left(tmp_path, http)
