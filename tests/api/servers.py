"""Real servers on real sockets, in a thread, over whatever services a test gives them."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from loraplex_adapters.registry import AdapterRegistry
from loraplex_server.app import create_app
from loraplex_server.auth import Keys
from loraplex_server.observer import NullObserver, RequestObservers
from loraplex_server.services import BaseModel, HttpLimits, Services
from loraplex_server.tokenizer import Tokenizer
from tests.api.scripted import Script, ScriptedWorker, say
from tests.models import VOCAB_SIZE, make_tokenizer

BASE = BaseModel(
    names=("base-model", "base-alias"),
    root="/models/base",
    fingerprint="ba5e" * 16,
    vocab_size=VOCAB_SIZE,
    created_at=1,
)


@dataclass(frozen=True)
class Server:
    """A running server and ways to talk to it."""

    port: int
    services: Services
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def worker(self) -> Any:
        return self.services.worker

    def http(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **kwargs)

    def openai(self, key: str = "none") -> openai.OpenAI:
        """The official client; closed with the server."""
        if key not in self.clients:
            http = httpx.Client(timeout=20, trust_env=False)
            self.clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=http)
        return self.clients[key]


def scripted_services(
    folder: Path,
    script: Script | None = None,
    *,
    adapters: Sequence[str] = (),
    keys: Keys | None = None,
    limits: HttpLimits | None = None,
    metrics: RequestObservers | None = None,
    model_len: int = 512,
    chat_template: str | None = None,
    tokenizer: Any = None,
) -> Services:
    """Services over a scripted worker; adapters are names without content."""
    registry = AdapterRegistry(folder / "registry.db", reserved=BASE.names)
    for index, name in enumerate(adapters):
        registry.publish(name, f"{index:02x}" * 32)
    store = SimpleNamespace(manifest=lambda digest: SimpleNamespace(max_rank=16))
    return Services(
        worker=ScriptedWorker(script or say("Hello, world"), model_len=model_len),  # type: ignore[arg-type]
        registry=registry,
        installer=SimpleNamespace(store=store),  # type: ignore[arg-type]
        tokenizer=Tokenizer(tokenizer or make_tokenizer(), chat_template),
        base=BASE,
        keys=keys or Keys(loopback=True),
        metrics=metrics or NullObserver(),
        limits=limits or HttpLimits(),
    )


@contextmanager
def serve(services: Services, app: FastAPI | None = None) -> Iterator[Server]:
    """A server for these services until the end of the block; ``app`` if a test has changed theirs."""
    config = uvicorn.Config(
        app or create_app(services), host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server", daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server did not start in time"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Server(port, services)
    try:
        yield running
    finally:
        for client in running.clients.values():
            client.close()
        server.should_exit = True
        thread.join(20)
        services.registry.close()
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Any, timeout_s: float = 5.0) -> None:
    """Poll for something that happens on the server's side."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
