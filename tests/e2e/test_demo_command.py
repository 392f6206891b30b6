"""`loraplex demo`, the first thing that a newcomer runs."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.e2e.serving import ANSWERS, clean_env, loraplex

pytestmark = pytest.mark.e2e


def test_the_demo_shows_every_adapter_and_exits_with_zero() -> None:
    # Settings of the user's own server are not the demo's.
    done = loraplex("demo", LORAPLEX_PORT="1", LORAPLEX_API_KEY="mine")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = " ".join(done.stdout.split())
    for name, answer in ANSWERS.items():
        assert name in shown
        assert answer in shown
    assert "Uploaded emoji over HTTP" in shown
    assert "🌍 The capital of France is Paris." in shown
    assert "Unloaded emoji" in shown
    assert "404 model_not_found, as it should be" in shown
    counted = [
        line.split("│")[1:4] for line in done.stdout.partition("What Prometheus saw")[2].splitlines() if "│" in line
    ]
    requests = {adapter.strip(): int(count) for adapter, _, count in counted}
    assert requests == {"base": 1, "shout": 2, "json": 2, "pirate": 2, "emoji": 1}
    assert "Traceback" not in done.stderr


def test_a_kept_demo_serves_until_ctrl_c_and_leaves_quietly(free_port: int) -> None:
    command = [sys.executable, "-m", "loraplex_server.cli", "demo", "--keep", "--port", str(free_port)]
    # Ctrl-C reaches the whole group, so the demo gets one of its own.
    process = subprocess.Popen(
        command, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "curl" in line:
                break
        assert any("loraplex chat --base-url" in line for line in lines), lines
        assert httpx.get(f"http://127.0.0.1:{free_port}/v1/models").status_code == 200
        begun = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    assert time.monotonic() - begun < 20
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{free_port}/health")
