"""A small Loraplex-like server on a real socket, for what a mock transport cannot show."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .drivers import adapter_json, chat_answer, chat_chunk


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    authorization: str | None
    body: bytes
    content_type: str
    port: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def form(self) -> list[tuple[str, str | None, bytes]]:
        """The parts of a multipart body: (field, file name, content)."""
        head = f"Content-Type: {self.content_type}\r\n\r\n".encode()
        parts: Any = message_from_bytes(head + self.body).get_payload()
        return [
            (part.get_param("name", header="content-disposition"), part.get_filename(), part.get_payload(decode=True))
            for part in parts
        ]


class Handler(BaseHTTPRequestHandler):
    """Routes to `FakeServer`."""

    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        seen = Seen(
            self.command,
            self.path,
            self.headers.get("authorization"),
            body,
            self.headers.get("content-type", ""),
            self.client_address[1],
        )
        self.fake.seen.append(seen)
        self.fake.answer(self, seen)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def json(self, status_code: int, value: Any, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status_code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        self.wfile.write(content)

    def error(self, status_code: int, message: str, code: str | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self.json(status_code, {"error": error}, x_should_retry="false")

    def start_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("x-loraplex-adapter", "pirate")
        self.end_headers()

    def send(self, content: bytes) -> None:
        """One HTTP chunk."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def send_event(self, payload: Any) -> None:
        self.send(f"data: {payload if isinstance(payload, str) else json.dumps(payload)}\n\n".encode())

    def end_events(self) -> None:
        self.send_event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")


def stream_words(handler: Handler, seen: Seen) -> None:
    """Answer with the model's name and the last message, word by word."""
    request = seen.json
    text = f"{request['model']} heard: {request['messages'][-1]['content']}"
    if not request.get("stream"):
        return handler.json(200, chat_answer(text))
    handler.start_events()
    words = text.split(" ")
    for index, word in enumerate(words):
        handler.send_event(chat_chunk(word if index == 0 else f" {word}"))
    usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
    handler.send_event({"id": "chatcmpl-1", "choices": [], "usage": usage})
    return handler.end_events()


@dataclass
class FakeServer:
    """Keeps adapters in a dict; `chat` may be replaced to misbehave."""

    url: str = ""
    chat: Callable[[Handler, Seen], None] = stream_words
    admin_key: str | None = None
    seen: list[Seen] = field(default_factory=list)
    adapters: dict[str, dict[str, Any]] = field(default_factory=lambda: {"pirate": adapter_json()})

    def answer(self, handler: Handler, seen: Seen) -> None:
        path = seen.path
        if path == "/v1/chat/completions":
            self.chat(handler, seen)
        elif path == "/v1/models":
            cards = [{"id": "tiny-llama"}, *({"id": name, "parent": "tiny-llama"} for name in self.adapters)]
            handler.json(200, {"object": "list", "data": cards})
        elif path.startswith("/v1/models/"):
            self._card(handler, path.removeprefix("/v1/models/"))
        elif path.startswith("/v1/adapters") and self.admin_key and seen.authorization != f"Bearer {self.admin_key}":
            handler.error(401, "The admin key is missing or wrong.", "invalid_api_key")
        elif path == "/v1/adapters" and seen.method == "GET":
            handler.json(200, {"object": "list", "data": list(self.adapters.values())})
        elif path == "/v1/adapters" and seen.method == "POST":
            self._publish(handler, seen)
        elif path.startswith("/v1/adapters/"):
            self._one(handler, seen, path.removeprefix("/v1/adapters/"))
        else:
            handler.error(404, "no such route")

    def _card(self, handler: Handler, name: str) -> None:
        if name not in {"tiny-llama", *self.adapters}:
            return handler.error(404, f"there is no model named {name!r}", "model_not_found")
        return handler.json(200, {"id": name})

    def _publish(self, handler: Handler, seen: Seen) -> None:
        if seen.content_type == "application/json":
            fields = seen.json
        else:
            fields = {name: content.decode() for name, file_name, content in seen.form if file_name is None}
        name = fields["name"]
        if name in self.adapters and fields["replace"] not in (True, "true"):
            return handler.error(409, f"the name {name!r} is taken by other content", "adapter_name_taken")
        self.adapters[name] = adapter_json(name, pinned=fields["pinned"] in (True, "true"))
        return handler.json(201, self.adapters[name])

    def _one(self, handler: Handler, seen: Seen, name: str) -> None:
        if name not in self.adapters:
            return handler.error(404, f"there is no adapter named {name!r}", "adapter_not_found")
        adapter = self.adapters[name]
        if seen.method == "DELETE":
            del self.adapters[name]
            deleted = {"object": "adapter.deleted", "name": name, "deleted": True, "digest": adapter["digest"]}
            return handler.json(200, {**deleted, "freed_bytes": adapter["num_bytes"]})
        if seen.method == "PATCH":
            adapter.update(seen.json)
            for version in adapter["versions"]:
                version["current"] = version["version"] == adapter["version"]
        return handler.json(200, adapter)


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    """Serve until the block is left; all connections are closed then."""
    handler = type("BoundHandler", (Handler,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield fake
        server.shutdown()
        thread.join()
