"""A server whose engine has failed as a whole ends, so that whoever watches over it starts it again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import clean_env

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
