"""Streamed requests on plain sockets: a client in front of thousands of events a second must not be what is measured.

HTTP/1.1 as servers of this API speak it: one response at a time, chunked or with a length, connections kept open.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from urllib.parse import urlsplit

from .answer import Answer

_HEAD_END = b"\r\n\r\n"
_LONGEST_HEAD = 64 * 1024


class StreamError(Exception):
    """A stream that cannot go on; the message is a short code, for counting."""


class _Connection(asyncio.Protocol):
    """One socket; serves one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self.is_open = False
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._buffer = b""
        self._in_body = False
        self._left = 0
        self._chunked = False
        self._until_close = False
        self._keep = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]
        self.is_open = True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._answer is not None and self._in_body and self._until_close:
            self._complete()
        else:
            self._fail("connection_lost")

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send a request and read its whole answer. Raises StreamError."""
        assert self.transport is not None
        self._answer, self._done = answer, self._loop.create_future()
        self._in_body = self._until_close = self._chunked = False
        self._left = 0
        self._keep = True
        self.transport.write(request)
        await self._done

    def close(self) -> None:
        self.is_open = False
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self._answer is None:
            self.close()  # nobody asked
            return
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        try:
            if not self._in_body:
                head, found, data = data.partition(_HEAD_END)
                if not found:
                    if len(head) > _LONGEST_HEAD:
                        raise StreamError("not_http")
                    self._buffer = head
                    return
                self._read_head(head, self._answer)
            self._read_body(data, now, self._answer)
        except (StreamError, ValueError):
            self._fail("not_http")
            self.close()

    def _read_head(self, head: bytes, answer: Answer) -> None:
        lines = head.split(b"\r\n")
        version, _, rest = lines[0].partition(b" ")
        if not version.startswith(b"HTTP/1."):
            raise StreamError("not_http")
        answer.status = int(rest[:3])
        headers = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        self._chunked = headers.get(b"transfer-encoding") == b"chunked"
        self._keep = headers.get(b"connection") != b"close"
        self._until_close = not self._chunked and b"content-length" not in headers
        self._left = int(headers.get(b"content-length", 0))
        self._in_body = True

    def _read_body(self, data: bytes, now: float, answer: Answer) -> None:
        if self._chunked:
            self._read_chunks(data, now, answer)
            return
        answer.feed(data, now)
        self._left -= len(data)
        if self._left <= 0 and not self._until_close:
            self._complete()

    def _read_chunks(self, data: bytes, now: float, answer: Answer) -> None:
        """``_left``: bytes of the current chunk that are still to come, with the line end that follows it."""
        position, parts = 0, []
        while position < len(data):
            if self._left:
                taken = min(self._left, len(data) - position)
                payload = min(taken, max(0, self._left - 2))
                parts.append(data[position : position + payload])
                self._left -= taken
                position += taken
                continue
            end = data.find(b"\r\n", position)
            if end < 0:
                self._buffer = data[position:]
                break
            size = int(data[position:end].partition(b";")[0], 16)
            if size == 0:
                # Trailers, if there are any, end with an empty line of their own.
                if data.find(b"\r\n\r\n", end) < 0:
                    self._buffer = data[position:]
                    break
                answer.feed(b"".join(parts), now)
                self._complete()
                return
            self._left = size + 2
            position = end + 2
        if parts:
            answer.feed(b"".join(parts), now)

    def _complete(self) -> None:
        answer, done = self._answer, self._done
        self._answer = None
        self._buffer = b""
        if answer is not None:
            answer.finish()
        if done is not None and not done.done():
            done.set_result(None)
        if not self._keep:
            self.close()

    def _fail(self, code: str) -> None:
        done, self._answer = self._done, None
        if done is not None and not done.done():
            done.set_exception(StreamError(code))


class StreamClient:
    """Streams from one address; connections are kept and used again."""

    def __init__(self, url: str, path: str, api_key: str | None, timeout_s: float) -> None:
        """``url``: with or without a last ``/v1``; ``path``: below it, such as ``/v1/completions``."""
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._timeout_s = timeout_s
        target = parts.path.rstrip("/").removesuffix("/v1") + path
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"POST {target} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n{key}"
            "content-type: application/json\r\naccept: text/event-stream\r\ncontent-length: "
        ).encode()
        self._idle: list[_Connection] = []

    async def post(self, body: bytes, answer: Answer) -> None:
        """One request; its answer is read into ``answer`` while it comes. What goes wrong is the answer's ``error``."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._post(self._head + str(len(body)).encode() + _HEAD_END + body, answer)
        except TimeoutError:
            answer.error = "timeout"
        except StreamError as error:
            answer.error = answer.error or str(error)
        except OSError as error:
            answer.error = f"connection_{type(error).__name__}"

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the sockets go

    async def _post(self, request: bytes, answer: Answer) -> None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                await self._exchange(connection, request, answer)
                return
            except StreamError:
                # A server may close a connection at the moment it is used again; then nothing of an answer has come.
                if answer.status:
                    raise
        await self._exchange(await self._connect(), request, answer)

    async def _exchange(self, connection: _Connection, request: bytes, answer: Answer) -> None:
        try:
            await connection.exchange(request, answer)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        connection = _Connection(loop)
        await loop.create_connection(lambda: connection, self._host, self._port, ssl=self._ssl)
        return connection
