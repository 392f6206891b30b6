"""The documentation as tests see it: pages, the blocks in them that are run, and a server for those.

A block that follows ``<!-- run -->`` is run in a folder in which ``server/`` is the checkout's, against a server of the
embedded demo model; ``<!-- run keys -->`` against one with the keys user-secret and admin-secret; with ``refused``, an HTTP error is what it shows. A block
that follows ``<!-- prints -->`` is what the block before it must print; ``...`` stands for anything.
"""

import doctest
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
ADDRESS = "127.0.0.1:8000"

_MARK = re.compile(r"<!-- (run|prints)\b(.*?)-->")
_FENCE = re.compile(r"```(\w*)")
_MATCH = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass
class Block:
    """A fenced block. ``marks``: the words after ``run``, None for a block that is only shown."""

    page: str
    line: int
    language: str
    text: str
    marks: tuple[str, ...] | None
    printed: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, each with what it must print."""
    found: list[Block] = []
    mark: tuple[str, tuple[str, ...]] | None = None
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if seen := _MARK.fullmatch(line.strip()):
            mark = seen[1], tuple(seen[2].split())
        elif fence := _FENCE.match(line):
            text = "\n".join(_until_closed(lines))
            kind, words = mark or ("shown", ())
            if kind == "prints":
                found[-1].printed = text
            else:
                marks = words if kind == "run" else None
                found.append(Block(str(page.relative_to(ROOT)), number, fence[1], text, marks))
            mark = None
    return found


def _until_closed(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for _, line in lines:
        if line.startswith("```"):
            return
        yield line
    raise AssertionError("a block is not closed")


def run_block(block: Block, address: str, folder: Path) -> None:
    """Run a block; what it prints must be what the page says."""
    text = block.text.replace(ADDRESS, address)
    env = {key: value for key, value in os.environ.items() if not key.startswith("LORAPLEX_")}
    env |= {"LORAPLEX_BASE_URL": f"http://{address}", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    env |= {
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONWARNINGS": "error::ResourceWarning",
        "COLUMNS": "120",
    }
    marks = block.marks or ()
    if block.language == "python":
        command = [sys.executable, "-c", text]
    else:
        strict = "" if "refused" in marks else "--fail-with-body"
        prelude = f'set -euo pipefail; curl() {{ command curl --silent --show-error {strict} "$@"; }}\n'
        command = ["bash", "-c", prelude + text]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    if block.printed is not None:
        matches = doctest.OutputChecker().check_output(f"{block.printed}\n", f"{done.stdout}\n", _MATCH)
        assert matches, f"{block} should print\n{block.printed}\nbut printed\n{done.stdout}"


@contextmanager
def demo_server(folder: Path) -> Iterator[str]:
    """``host:port`` of a server of the embedded demo model, as ``make serve`` starts one."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("LORAPLEX_")}
    command = [sys.executable, "-m", "loraplex_server.cli", "serve", "--model", "demo", "--device", "cpu"]
    command += ["--port", "0", "--data-dir", str(folder / "data"), "--log-format", "json"]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield _await_address(process, log)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _await_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            if line.startswith("{") and line.endswith("}") and json.loads(line).get("event") == "ready":
                return str(json.loads(line)["url"]).removeprefix("http://")
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
