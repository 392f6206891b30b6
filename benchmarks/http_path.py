"""The road from the engine to HTTP clients, without a model: streams of chat completions out of a scripted engine.

    python -m benchmarks.http_path --rates 0 12000 --streams 32

The engine hands out made-up tokens in its own process (``--engine thread``: on a thread of the server's), at a set rate in
tokens a second or as fast as it can (0); the real bridge, detokenizer, API and web server bring them to clients on plain
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import structlog
import uvicorn

from benchmarks import RESULTS
from benchmarks.scripted_engine import ScriptedRecipe
from loraplex_adapters.install import AdapterInstaller
from loraplex_adapters.registry import AdapterRegistry
from loraplex_server.app import create_app
from loraplex_server.auth import Keys
from loraplex_server.bench.record import circumstances, write_csv
from loraplex_server.demo import DEMO_MODEL
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

    def __init__(self, port: int, tokens: int, model: str) -> None:
        body = json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": "Tell me about France."}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._port = port

    def run(self, streams: int) -> dict[str, float]:
        """All streams at once, to their ends: tokens, events and seconds from the first byte to the last."""
        selector = selectors.DefaultSelector()
        for _ in range(streams):
            connection = socket.create_connection(("127.0.0.1", self._port))
            connection.sendall(self._request)
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


def measure(engine: str, rate: float, streams: int, tokens: int) -> dict[str, object]:
    """One case, with a server of its own; the first of two runs is the warm-up."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, engine, rate), daemon=True)
    server.start()
    theirs.close()
    client = StreamClient(ours.recv(), tokens, _NAME)
    client.run(streams)
    ours.send("cpu")
    before = ours.recv()
    found = client.run(streams)
    ours.send("cpu")
    cpu_s = ours.recv() - before
    ours.send("stop")
    server.join(20)
    return {
        "engine": engine,
        "streams": streams,
        "offered_tokens_per_s": rate,
        "tokens_per_s": round(found["tokens"] / found["seconds"]),
        "events_per_s": round(found["events"] / found["seconds"]),
        "server_cpu_us_per_token": round(cpu_s / found["tokens"] * 1e6, 1),
        "server_cpu_us_per_event": round(cpu_s / max(found["events"], 1) * 1e6, 1),
        "server_busy": round(cpu_s / found["seconds"], 3),
    }


def _serve(commands: Connection, engine: str, rate: float) -> None:
    """The server's process: says its port, then its processor time whenever it is asked."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    tokenizer = Tokenizer.load(DEMO_MODEL)
    printable = tuple(i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i).strip().isalpha())
    recipe = ScriptedRecipe(printable, rate)
    host = EngineThread(recipe) if engine == "thread" else EngineProcess(recipe)
    facts = host.load()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        registry = AdapterRegistry(Path(scratch) / "registry.sqlite", reserved=(_NAME,))
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
        threading.Thread(target=_obey, args=(commands, server), daemon=True).start()
        server.run()


def _obey(commands: Connection, server: uvicorn.Server) -> None:
    while not server.started:
        time.sleep(0.01)
    commands.send(server.servers[0].sockets[0].getsockname()[1])
    while (command := commands.recv()) != "stop":
        assert command == "cpu"
        commands.send(time.process_time())
    server.should_exit = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=["thread", "process"], default=["process"])
    parser.add_argument("--rates", nargs="+", type=float, default=[4000, 12000, 0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=600, help="of each stream")
    parser.add_argument("--out", type=Path, default=RESULTS / "http_path.csv")
    args = parser.parse_args()
    rows = []
    for engine in args.engines:
        for rate in args.rates:
            rows.append(measure(engine, rate, args.streams, args.tokens))
            print(rows[-1], flush=True)
    where = circumstances(["uvicorn", "starlette", "tokenizers"])
    write_csv(args.out, [{**row, **where} for row in rows])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
