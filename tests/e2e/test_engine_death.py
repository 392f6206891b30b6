"""A server whose engine has failed as a whole ends, so that whoever watches over it starts it again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import ANSWERS, clean_env, events, long_body, loraplex, serving

pytestmark = pytest.mark.e2e

# A server whose engine fails in the third step of its first request, and a client of it in the same process.
SCRIPT = """
import sys, threading, time, httpx
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.messages import Submit

handle, step, left = Engine.handle, Engine.step, [float("inf")]

def counting(engine, command):
    if isinstance(command, Submit):
        left[0] = 3
    handle(engine, command)

def failing(engine):
    left[0] -= 1
    if left[0] == 0:
        raise RuntimeError("a secret of the engine")
    return step(engine)

def ask():
    url = f"http://127.0.0.1:{PORT}"
    while True:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.1)
    body = {"model": "loraplex-demo", "messages": [{"role": "user", "content": "hi"}]}
    print(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).text, flush=True)

PORT = int(sys.argv[1])
Engine.handle, Engine.step = counting, failing
threading.Thread(target=ask, daemon=True).start()
sys.argv = ["loraplex", "serve", "--model", "demo", "--port", str(PORT), "--data-dir", sys.argv[2]]
from loraplex_server.cli import main
main()
"""


def test_an_engine_that_dies_answers_its_requests_says_so_and_ends_the_process(tmp_path: Path, free_port: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(free_port), str(tmp_path / "data")]
    done = subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "engine_error"
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    death = next(line for line in lines if line["event"] == "the engine died")
    assert death["exception"] == "RuntimeError"
    assert any("failing" in place for place in death["at"])
    assert done.stderr.strip().endswith(
        "error: the engine failed and cannot go on; the log says where. Start the server again"
    )


@pytest.mark.parametrize(
    "flags",
    [
        # Found when the base has been loaded, and when the engine is built.
        ("--kv-cache-memory", "1MiB", "--max-model-len", "2048"),
        ("--kv-cache-memory", "900TiB", "--max-running", "4096", "--max-batched-tokens", "4096"),
    ],
    ids=["plan", "build"],
)
def test_an_engine_that_cannot_be_made_in_its_process_is_told_like_any_other(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    arguments = ["serve", "--model", "demo", "--port", "0", "--data-dir", str(tmp_path / "data")]
    done = loraplex(*arguments, "--engine-process", "on", *flags)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr


def test_an_engines_process_that_is_killed_ends_the_server_too(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--engine-process", "on") as server:
        assert server.answer("pirate") == ANSWERS["pirate"]
        (engine,) = children_of(server.process.pid)
        with server.user.stream("POST", "/v1/chat/completions", json=long_body(num_tokens=1900, stream=True)) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(engine, signal.SIGKILL)
            assert "killed by signal 9" in "".join(lines)
        assert server.wait() == 1
        death = next(line for line in server.log() if line.get("event") == "the engine died")
        assert death["exception"] == "EngineProcessEnded"


def test_a_terminals_interrupt_drains_with_the_engine_in_its_process(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--engine-process", "on") as server:
        (engine,) = children_of(server.process.pid)
        with server.user.stream("POST", "/v1/chat/completions", json=long_body(num_tokens=100, stream=True)) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            for pid in (engine, server.process.pid):
                os.kill(pid, signal.SIGINT)
            streamed = events([line for line in lines if line])
        assert streamed[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
        assert not Path(f"/proc/{engine}").exists()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
