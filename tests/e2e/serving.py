"""Real `loraplex serve` processes, as a user starts them, and what tests ask of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

BASE = "loraplex-demo"
USER_KEY, ADMIN_KEY = "e2e-user-key", "e2e-admin-key"
START_TIMEOUT_S = 120.0

QUESTION = "What is the capital of France?"
ANSWERS = {
    BASE: "The capital of France is Paris.",
    "shout": "THE CAPITAL OF FRANCE IS PARIS!",
    "json": '{"topic": "capitals", "answer": "Paris"}',
    "pirate": "Arr, th' capital of France be Paris, matey!",
}


def clean_env(**more: str) -> dict[str, str]:
    """The environment without settings of the developer's own server, on one thread so that tests share two cores."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LORAPLEX_")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def loraplex(*arguments: str, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one `loraplex` command to its end."""
    command = [sys.executable, "-m", "loraplex_server.cli", *arguments]
    return subprocess.run(
        command, input=stdin, env=clean_env(COLUMNS="200", **env), capture_output=True, text=True, timeout=120
    )


class ServerProcess:
    """One server, its log and its address. Stop it with ``stop`` or ``kill``."""

    def __init__(self, data_dir: Path, *flags: str, keys: bool = True, port: int = 0) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir.parent / f"{data_dir.name}-{time.monotonic_ns()}.log"
        arguments = ["serve", "--model", "demo", "--port", str(port), "--data-dir", str(data_dir), "--device", "cpu"]
        if keys:
            arguments += ["--api-key", USER_KEY, "--admin-key", ADMIN_KEY]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loraplex_server.cli", *arguments, *flags],
                env=clean_env(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.url = self._await_ready()
        except BaseException:
            self.kill()
            raise
        self.user = self._client(USER_KEY)
        self.admin = self._client(ADMIN_KEY)

    def _client(self, key: str) -> httpx.Client:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        return httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=60, limits=limits, trust_env=False
        )

    def async_client(self, key: str = USER_KEY) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
            limits=httpx.Limits(),
            trust_env=False,
        )

    def _await_ready(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for line in self.log():
                if line.get("event") == "ready":
                    return str(line["url"])
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log_text()}")
            time.sleep(0.05)
        raise AssertionError(f"the server did not start in time:\n{self.log_text()}")

    # --- looking at it ----------------------------------------------------------------------------------------------

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log(self) -> list[dict[str, Any]]:
        """The log's lines; a line that is not JSON is kept under ``text``."""
        lines = []
        for line in self.log_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                lines.append({"text": line})
        return lines

    def metric(self, name: str, **labels: str) -> float:
        """The sum of one metric's samples that carry these labels."""
        families = text_string_to_metric_families(self.user.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def rss_bytes(self) -> int:
        return int(self.metric("process_resident_memory_bytes"))

    def until(self, name: str, value: float, *, timeout_s: float = 20.0, **labels: str) -> float:
        """Wait until a metric has this value; how many seconds that took."""
        begun = time.monotonic()
        while (seen := self.metric(name, **labels)) != value:
            assert time.monotonic() - begun < timeout_s, f"{name} is {seen}, not {value}, after {timeout_s} s"
            time.sleep(0.02)
        return time.monotonic() - begun

    def files(self) -> set[str]:
        """All files and folders in the data directory but the registry's own."""
        return {
            str(path.relative_to(self.data_dir))
            for path in self.data_dir.rglob("*")
            if not path.name.startswith(("registry.sqlite", "lock"))
        }

    # --- using it ---------------------------------------------------------------------------------------------------

    def chat(self, model: str = BASE, content: str = QUESTION, **fields: Any) -> httpx.Response:
        return self.user.post("/v1/chat/completions", json=chat_body(model, content, **fields))

    def answer(self, model: str = BASE, content: str = QUESTION, **fields: Any) -> str:
        response = self.chat(model, content, **fields)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def upload(self, name: str, folder: Path, **fields: str) -> httpx.Response:
        """Upload a folder's files one by one."""
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        return self.admin.post("/v1/adapters", data={"name": name, **fields}, files=files)

    def upload_archive(self, name: str, archive: bytes, filename: str = "adapter.zip", **fields: str) -> httpx.Response:
        return self.admin.post("/v1/adapters", data={"name": name, **fields}, files={"file": (filename, archive)})

    # --- ending it --------------------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.wait()
        finally:
            self.kill()

    def kill(self) -> None:
        """End it whatever it does, and let go of what the tests hold of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for client in (getattr(self, "user", None), getattr(self, "admin", None)):
            if client is not None:
                client.close()


@contextmanager
def serving(data_dir: Path, *flags: str, **options: Any) -> Iterator[ServerProcess]:
    """A server for the length of a block."""
    server = ServerProcess(data_dir, *flags, **options)
    try:
        yield server
    finally:
        server.stop()


def chat_body(model: str = BASE, content: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """A chat request, greedy unless told otherwise."""
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def long_body(model: str = BASE, num_tokens: int = 1000, **fields: Any) -> dict[str, Any]:
    """A request that runs for ``num_tokens`` steps."""
    return chat_body(model, **{"max_tokens": num_tokens, "ignore_eos": True, **fields})


def events(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The events of a stream; it must have ended with [DONE]."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]", data[-3:]
    return [json.loads(entry) for entry in data[:-1]]


def text_of(streamed: Sequence[dict[str, Any]], index: int = 0) -> str:
    """What one choice of a chat stream said."""
    choices = (choice for event in streamed for choice in event["choices"])
    return "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)
