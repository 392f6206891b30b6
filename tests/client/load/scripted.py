"""A server that streams completions by script: when each piece comes, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Script = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request and the means to answer it. ``number`` counts all requests from 0."""

    def __init__(
        self, number: int, path: str, headers: dict[str, str], body: Any, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.path = path
        self.headers = headers
        self.body = body
        self._writer = writer

    async def begin(self) -> None:
        self._writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await self._writer.drain()

    async def event(self, data: str) -> None:
        payload = f"data: {data}\n\n".encode()
        self._writer.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")
        await self._writer.drain()

    async def text(self, text: str = "word") -> None:
        await self.event(json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}))

    async def end(self, prompt_tokens: int = 3, output_tokens: int = 0) -> None:
        if output_tokens:
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
            await self.event(json.dumps({"choices": [], "usage": usage}))
        await self.event("[DONE]")
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def refuse(self, status: int, code: str) -> None:
        body = json.dumps({"error": {"message": "no", "code": code}}).encode()
        self._writer.write(f"HTTP/1.1 {status} No\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        await self._writer.drain()

    def hang_up(self) -> None:
        self._writer.close()


class ScriptedServer:
    """``bodies`` are those of all requests so far, ``connections`` counts sockets."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._answer_all(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
            body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
            exchange = Exchange(len(self.bodies), head[0].split()[1], headers, body, writer)
            self.bodies.append(body)
            self.headers.append(headers)
            await self._script(exchange)


@contextmanager
def scripted_server(script: Script) -> Iterator[ScriptedServer]:
    """Serve on a thread of its own until the block ends."""
    server = ScriptedServer(script)
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        started.set()
        await stop.wait()
        listening.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
