"""The road from the engine to HTTP clients, without a model: streams of chat completions out of a scripted engine.

    python -m benchmarks.http_path --rates 0 12000 --streams 32

The engine hands out made-up tokens in its own process (``--engine thread``: on a thread of the server's), at a set rate in
tokens a second or as fast as it can (0); or a real engine of a model's shape runs there (--shape). The real bridge, detokenizer, API and web server bring them to clients on plain
sockets in a third process. Says how many tokens and events came through a second, and what one cost the server's process.
"""

import argparse
import json
import multiprocessing
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import structlog
import uvicorn

from benchmarks import RESULTS
from benchmarks.scripted_engine import ScriptedRecipe
from benchmarks.served_engine import ShapeRecipe, default_device, digest_of, write_tokenizer
from loraplex_adapters.install import AdapterInstaller
from loraplex_adapters.registry import AdapterRegistry
from loraplex_server.app import create_app
from loraplex_server.auth import Keys
from loraplex_server.bench.checkpoint import write_config
from loraplex_server.bench.record import circumstances, write_csv
from loraplex_server.bench.shapes import SHAPES
from loraplex_server.collector import spare_what_is_there
from loraplex_server.demo import DEMO_MODEL
from loraplex_server.engine.host import EngineHost, EngineRecipe
from loraplex_server.engine.process import EngineProcess
from loraplex_server.engine.thread import EngineThread
from loraplex_server.engine.worker import Worker
from loraplex_server.metrics import Metrics, adapter_names
from loraplex_server.services import BaseModel, Services
from loraplex_server.tokenizer import Tokenizer
from loraplex_server.web import web_config

_NAME = "scripted"
_BUFFER_BYTES = 1 << 18


class StreamClient:
    """Reads streams of chat completions from plain sockets, with as little work as it can."""

    def __init__(self, port: int, tokens: int) -> None:
        self._port, self._tokens = port, tokens

    def _request(self, model: str) -> bytes:
        body = json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": "Tell me about France."}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": self._tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def run(self, models: Sequence[str]) -> dict[str, float]:
        """A stream of each model, all at once, to their ends: tokens, events and seconds from first byte to last."""
        selector = selectors.DefaultSelector()
        for model in models:
            connection = socket.create_connection(("127.0.0.1", self._port))
            connection.sendall(self._request(model))
            selector.register(connection, selectors.EVENT_READ, bytearray())
        buffer, num_tokens, num_events, begun = bytearray(_BUFFER_BYTES), 0, 0, 0.0
        while selector.get_map():
            for key, _ in selector.select():
                connection, tail = cast(socket.socket, key.fileobj), key.data
                num_bytes = connection.recv_into(buffer)
                begun = begun or time.perf_counter()
                num_events += buffer.count(b'"delta":{"content"', 0, num_bytes)
                tail += buffer[:num_bytes]
                if b"[DONE]" in tail or not num_bytes:
                    num_tokens += _completion_tokens(tail)
                    selector.unregister(connection)
                    connection.close()
                del tail[:-1024]
        return {"tokens": num_tokens, "events": num_events, "seconds": time.perf_counter() - begun}


def _completion_tokens(tail: bytes | bytearray) -> int:
    """From a stream's last events. Raises ValueError for one that broke off."""
    found = bytes(tail).rpartition(b'"completion_tokens":')[2].partition(b",")[0]
    if not found.strip().isdigit():
        raise ValueError(f"a stream ended early: {bytes(tail[-300:])!r}")
    return int(found)


@dataclass(frozen=True)
class Case:
    """What is served, on a thread or in a process: a scripted engine that hands out ``rate`` tokens a second or, with a
    ``shape``, a real one with random weights and ``adapters`` adapters."""

    engine: str
    streams: int
    tokens: int
    rate: float = 0.0
    shape: str = ""
    adapters: int = 0

    @property
    def models(self) -> list[str]:
        """The model of each stream."""
        return [f"a{index % self.adapters}" if self.adapters else _NAME for index in range(self.streams)]


def measure(case: Case, repeats: int) -> dict[str, object]:
    """One case, with a server of its own; the first run is the warm-up, the best of the others counts."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Not a daemon: such a process may not start the engine's.
    server = context.Process(target=_serve, args=(theirs, case))
    server.start()
    theirs.close()
    port, alone = ours.recv()
    client = StreamClient(port, case.tokens)
    client.run(case.models)
    runs = [_run(client, case, ours) for _ in range(repeats)]
    ours.send("stop")
    server.join(20)
    best = max(runs, key=lambda run: run["tokens_per_s"])
    row: dict[str, object] = {**asdict(case), **{name: round(value, 3) for name, value in best.items()}}
    if alone:
        row |= {"engine_tokens_per_s": round(max(alone)), "share": round(best["tokens_per_s"] / max(alone), 3)}
    return row


def _run(client: StreamClient, case: Case, server: Connection) -> dict[str, float]:
    server.send("cpu")
    before = server.recv()
    found = client.run(case.models)
    server.send("cpu")
    cpu_s = server.recv() - before
    return {
        "tokens_per_s": found["tokens"] / found["seconds"],
        "events_per_s": found["events"] / found["seconds"],
        "server_us_per_token": cpu_s / found["tokens"] * 1e6,
        "server_us_per_event": cpu_s / max(found["events"], 1) * 1e6,
        "server_busy": cpu_s / found["seconds"],
    }


def _serve(commands: Connection, case: Case) -> None:
    """The server's process: says its port, then its processor time whenever it is asked."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        folder = Path(scratch)
        tokenizer, host = _parts(case, folder)
        facts = host.load()
        registry = AdapterRegistry(folder / "registry.sqlite", reserved=(_NAME,))
        for index in range(case.adapters):
            registry.publish(f"a{index}", digest_of(index))
        metrics = Metrics(model_name=_NAME, names=lambda: adapter_names(registry))
        worker = Worker(
            host, max_model_len=facts.max_model_len, max_waiting=1024, max_waiting_tokens=1 << 20,
            on_report=metrics.on_report,
        )  # fmt: skip
        services = Services(
            worker=worker,
            registry=registry,
            installer=cast(AdapterInstaller, None),
            tokenizer=tokenizer,
            base=BaseModel((_NAME,), "made up", facts.base.fingerprint, tokenizer.vocab_size, 0),
            keys=Keys(loopback=True),
            metrics=metrics,
        )
        server = uvicorn.Server(web_config(create_app(services), "127.0.0.1", 0))
        threading.Thread(target=_obey, args=(commands, server, folder / "alone.json"), daemon=True).start()
        server.run()


def _parts(case: Case, folder: Path) -> tuple[Tokenizer, EngineHost]:
    recipe: EngineRecipe
    if case.shape:
        write_config(folder, case.shape)
        write_tokenizer(folder, case.shape)
        tokenizer = Tokenizer.load(folder)
        recipe = ShapeRecipe(
            folder, case.shape, default_device(), case.streams, case.tokens, case.adapters, folder / "alone.json"
        )
    else:
        tokenizer = Tokenizer.load(DEMO_MODEL)
        printable = tuple(i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i).strip().isalpha())
        recipe = ScriptedRecipe(printable, case.rate)
    return tokenizer, EngineThread(recipe) if case.engine == "thread" else EngineProcess(recipe)


def _obey(commands: Connection, server: uvicorn.Server, alone: Path) -> None:
    while not server.started:
        time.sleep(0.01)
    spare_what_is_there()
    port = server.servers[0].sockets[0].getsockname()[1]
    commands.send((port, json.loads(alone.read_text()) if alone.exists() else []))
    while (command := commands.recv()) != "stop":
        assert command == "cpu"
        commands.send(time.process_time())
    server.should_exit = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=["thread", "process"], default=["process"])
    parser.add_argument("--rates", nargs="+", type=float, default=[4000, 12000, 0])
    parser.add_argument("--shape", choices=SHAPES, help="a real engine of this shape instead, with random weights")
    parser.add_argument("--adapters", nargs="+", type=int, default=[0, 8], help="with --shape")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=600, help="of each stream")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "http_path.csv")
    args = parser.parse_args()
    if args.shape:
        size = (args.streams, args.tokens, 0.0, args.shape)
        cases = [Case(engine, *size, adapters) for engine in args.engines for adapters in args.adapters]
    else:
        cases = [Case(engine, args.streams, args.tokens, rate) for engine in args.engines for rate in args.rates]
    rows = []
    for case in cases:
        rows.append(measure(case, args.repeats))
        print(rows[-1], flush=True)
    where = circumstances(["uvicorn", "starlette", "tokenizers"])
    write_csv(args.out, [{**row, **where} for row in rows])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
