"""What users get wrong is refused with a reason, leaves nothing behind and harms nobody else."""

import io
import pickle
import re
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.making import CONFIG, WEIGHTS, copy_of, with_tensors, zip_of, zipped
from tests.e2e.serving import ANSWERS, BASE, ServerProcess, long_body

pytestmark = pytest.mark.e2e


class Canary:
    """A pickle that leaves a file where it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def wrong_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value[:, :-1].contiguous() if value.shape[1] == 256 else value for key, value in tensors.items()}


def not_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    return {**tensors, first: tensors[first] * float("nan")}


def stranger(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("layers.0.", "layers.99."): value for key, value in tensors.items()}


def without_config(folder: Path) -> Path:
    (copy_of("emoji", folder) / CONFIG).unlink()
    return folder


def truncated(folder: Path) -> Path:
    weights = copy_of("emoji", folder) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def another_base(folder: Path) -> Path:
    copy_of("emoji", folder)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.zeros(*shape)
        for layer in range(8)
        for side, shape in (("A", (8, 4096)), ("B", (4096, 8)))
    }
    save_file({key: value.half() for key, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}')
    return folder


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "for another base": (another_base, r"another base|layer"),
    "wrong shapes": (lambda folder: with_tensors(folder, wrong_shape), r"128 x 255, the base's is 128 x 256"),
    "tensors that match no module": (lambda folder: with_tensors(folder, stranger), r"layers\.99|layer 99"),
    "not numbers": (lambda folder: with_tensors(folder, not_numbers), r"NaN|not numbers|finite"),
    "no configuration": (without_config, r"adapter_config\.json"),
    "weights cut off": (truncated, r"adapter_model\.safetensors|safetensors"),
    "DoRA": (lambda folder: copy_of("emoji", folder, config={"use_dora": True}), r"DoRA|use_dora"),
    "saved modules": (lambda folder: copy_of("emoji", folder, config={"modules_to_save": ["lm_head"]}), r"modules_to_save"),
    "not LoRA": (lambda folder: copy_of("emoji", folder, config={"peft_type": "IA3"}), r"IA3|peft_type"),
}  # fmt: skip


@pytest.fixture
def untouched(server: ServerProcess) -> Iterator[None]:
    """Whatever the test does: the same files, the same adapters, the same answers, and requests that run go on."""
    files = server.files()
    names = {card["id"] for card in server.user.get("/v1/models").json()["data"]}
    yield
    assert server.files() == files
    assert {card["id"] for card in server.user.get("/v1/models").json()["data"]} == names
    assert server.answer("shout") == ANSWERS["shout"]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_bad_adapter_is_refused_with_its_reason(server: ServerProcess, tmp_path: Path, what: str) -> None:
    make, reason = BAD_FOLDERS[what]
    refused = server.upload("bad", make(tmp_path / "bad"))
    assert refused.status_code == 422, refused.text
    assert refused.json()["error"]["code"]
    assert re.search(reason, refused.json()["error"]["message"]), refused.text


@pytest.mark.usefixtures("untouched")
def test_a_pickle_is_refused_and_never_opened(server: ServerProcess, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    poison = pickle.dumps(Canary(fired))
    for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin"):
        refused = server.upload_archive("bad", zipped(copy_of("emoji", tmp_path / name), **{name: poison}))
        assert refused.status_code == 422, refused.text
        assert "pickle" in refused.json()["error"]["message"]
    disguised = copy_of("emoji", tmp_path / "disguised")
    (disguised / WEIGHTS).write_bytes(poison)
    assert server.upload("bad", disguised).status_code == 422
    assert not fired.exists()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json"])
def test_an_archive_cannot_write_outside(server: ServerProcess, tmp_path: Path, name: str) -> None:
    refused = server.upload_archive("bad", zipped(copy_of("emoji", tmp_path / "a"), **{name: b"{}"}))
    assert refused.status_code == 422, refused.text
    assert not list(server.data_dir.parent.rglob("evil.json"))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_archive_cannot_hold_links_or_devices(server: ServerProcess, tmp_path: Path, kind: bytes) -> None:
    packed = io.BytesIO()
    folder = copy_of("emoji", tmp_path / "a")
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder / CONFIG, CONFIG)
        link = tarfile.TarInfo(WEIGHTS)
        link.type, link.linkname = kind, "/etc/passwd"
        archive.addfile(link)
    refused = server.upload_archive("bad", packed.getvalue(), "adapter.tar.gz")
    assert refused.status_code == 422, refused.text


@pytest.mark.usefixtures("untouched")
def test_a_zip_bomb_is_refused_before_it_unfolds(server: ServerProcess) -> None:
    before = server.rss_bytes()
    bomb = zip_of({CONFIG: b"{}", WEIGHTS: bytes(300 << 20)})
    assert len(bomb) < 1 << 20
    refused = server.upload_archive("bad", bomb)
    assert refused.status_code in (413, 422), refused.text
    assert server.rss_bytes() < before + (100 << 20)


@pytest.mark.usefixtures("untouched")
def test_an_upload_without_end_is_cut_off_early(server: ServerProcess) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\ncontent-disposition: form-data; name="name"\r\n\r\nbig\r\n'
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="big.zip"\r\n\r\n'
        for _ in range(1024):
            sent += 1 << 20
            yield bytes(1 << 20)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    try:
        refused = server.admin.post("/v1/adapters", content=body(), headers=headers)
    except httpx.WriteError:
        refused = None  # the connection was closed while we were still sending
    assert refused is None or refused.status_code == 413, refused.text
    # What the sockets hold comes on top of the server's own limit.
    assert sent < 64 << 20


@pytest.mark.usefixtures("untouched")
def test_an_upload_that_announces_a_gigabyte_is_refused_unread(server: ServerProcess) -> None:
    headers = {
        "content-type": "multipart/form-data; boundary=x",
        "content-length": str(1 << 30),
        "authorization": server.admin.headers["authorization"],
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(f"POST /v1/adapters HTTP/1.1\r\nhost: {host}\r\n{lines}\r\n".encode())
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 413")


@pytest.mark.usefixtures("untouched")
def test_a_taken_name_is_a_conflict(server: ServerProcess, tmp_path: Path) -> None:
    refused = server.upload("shout", copy_of("emoji", tmp_path / "a"))
    assert refused.status_code == 409
    assert "replace" in refused.json()["error"]["message"]
    base = server.upload(BASE, copy_of("emoji", tmp_path / "b"))
    assert 400 <= base.status_code < 500, base.text


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", ["", " ", "a b", "../up", "a" * 300, "x@2", "café"])
def test_a_name_that_cannot_be_one_is_refused(server: ServerProcess, tmp_path: Path, name: str) -> None:
    refused = server.upload(name, copy_of("emoji", tmp_path / "a"))
    assert refused.status_code in (400, 422), refused.text
    assert "name" in refused.json()["error"]["message"]


@pytest.mark.usefixtures("untouched")
def test_sources_outside_the_allowed_folders_are_refused(server: ServerProcess, adapter_root: Path) -> None:
    for source in ("/etc", f"{adapter_root}/../data", "file:///etc", "http://169.254.169.254/latest", "s3://b/k"):
        refused = server.admin.post("/v1/adapters", json={"name": "bad", "source": source})
        assert refused.status_code in (400, 403, 422), (source, refused.text)
        assert refused.json()["error"]["message"]


@pytest.mark.usefixtures("untouched")
def test_an_unknown_model_and_a_long_prompt_say_what_would_work(server: ServerProcess) -> None:
    unknown = server.chat("nobody")
    assert unknown.status_code == 404
    assert "`shout`" in unknown.json()["error"]["message"]
    long = server.chat(content="word " * 3000)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "2048" in long.json()["error"]["message"]
    huge = server.chat(content="word " * 4_000_000)
    assert huge.status_code == 413, huge.text[:300]


@pytest.mark.usefixtures("untouched")
def test_requests_that_run_notice_nothing_of_bad_uploads(server: ServerProcess, tmp_path: Path) -> None:
    alone = server.user.post("/v1/chat/completions", json=long_body("pirate", 150, logprobs=True)).json()
    answers = []

    def ask() -> None:
        answers.append(server.user.post("/v1/chat/completions", json=long_body("pirate", 150, logprobs=True)).json())

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.1)
    for number, (make, _) in enumerate(BAD_FOLDERS.values()):
        assert server.upload("bad", make(tmp_path / f"bad-{number}")).status_code == 422
    asking.join()
    assert answers[0]["choices"][0]["message"] == alone["choices"][0]["message"]
