"""A server of our own for one run, started as a user would start it, on a random base with random adapters."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex_server.bench.checkpoint import write_adapter
from loraplex_server.bench.rig import BaseChoice
from loraplex_server.bench.shapes import spec_of
from loraplex_server.bench.tokenizer import write_tokenizer

_START_S = 600.0
_LOG_SHOWN = 3000


class ServerNotStarted(Exception):
    """The server ended before it was ready; the message is the end of its log."""


@dataclass(frozen=True)
class OwnServer:
    """``models``: the base's name, then the adapters'. ``start_s``: from the command to the first answer of /ready."""

    url: str
    base: str
    adapters: tuple[str, ...]
    start_s: float


@contextmanager
def own_server(choice: BaseChoice, ranks: Sequence[int], flags: Sequence[str], scratch: Path) -> Iterator[OwnServer]:
    """Serve until the block ends. ``flags``: of ``loraplex serve``, after those that the choice implies.

    Raises ServerNotStarted.
    """
    folder = choice.folder(scratch)
    if not choice.is_real:
        write_tokenizer(folder, spec_of(choice.shape).vocab_size)
    adapters = {f"a{i}": scratch / f"a{i}" for i in range(len(ranks))}
    for (_, path), (i, rank) in zip(adapters.items(), enumerate(ranks), strict=True):
        write_adapter(path, choice.shape, rank=rank, seed=i)
    command = [sys.executable, "-m", "loraplex_server.cli", "serve", "--model", str(folder)]
    command += [
        "--served-model-name",
        choice.name,
        "--device",
        choice.device.type,
        "--quantization",
        choice.quantization,
    ]
    command += ["--load-format", choice.load_format]
    command += ["--port", "0", "--log-format", "json", "--data-dir", str(scratch / "data")]
    if choice.dtype is not None:
        command += ["--dtype", str(choice.dtype).removeprefix("torch.")]
    for name, path in adapters.items():
        command += ["--adapter", f"{name}={path}"]
    # Settings meant for the user's own server stay out.
    env = {key: value for key, value in os.environ.items() if not key.startswith("LORAPLEX_")}
    log_path = scratch / "server.log"
    started = time.perf_counter()
    with log_path.open("wb") as log:
        process = subprocess.Popen([*command, *flags], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = _await_ready(process, log_path)
        yield OwnServer(url, choice.name, tuple(adapters), time.perf_counter() - started)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(process: "subprocess.Popen[bytes]", log_path: Path) -> str:
    """The server's address, from its log."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        text = log_path.read_text(errors="replace")
        for line in text.splitlines():
            if '"event": "ready"' in line and line.endswith("}"):
                return str(json.loads(line)["url"])
        if ended:
            raise ServerNotStarted(f"the server did not start:\n{text[-_LOG_SHOWN:]}")
        time.sleep(0.05)
    raise ServerNotStarted(f"the server was not ready after {_START_S:.0f} s:\n{text[-_LOG_SHOWN:]}")
