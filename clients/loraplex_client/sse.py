"""Server-sent events from bytes, one chunk at a time.

Source: the event stream grammar of the WHATWG HTML standard, section 9.2.6. Stricter than it in two places: the bytes
must be UTF-8, and an event may not grow without limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import ResponseFormatError

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event; `data` has its lines joined by newlines."""

    data: str
    event: str = "message"
    id: str | None = None


class EventDecoder:
    """Turns the bytes of one stream, cut anywhere, into events.

    Raises ResponseFormatError: a line is not UTF-8, or an event exceeds `max_event_bytes`.
    """

    def __init__(self, *, max_event_bytes: int = 16 * 2**20) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()
        self._skip_newline = False
        self._at_start = True
        self._event_bytes = 0
        self._data: list[str] = []
        self._event = ""
        self._id: str | None = None

    @property
    def pending(self) -> bool:
        """True if the bytes so far end inside an event."""
        return bool(self._line or self._data)

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """Yield the events that `chunk` completes. Consume the iterator before feeding again."""
        # A "\r" ends a line at once, so that the event is not held back; a "\n" that follows it belongs to it.
        if self._skip_newline and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_newline = False
        if not chunk:
            return
        self._skip_newline = chunk.endswith(b"\r")
        *complete, rest = _LINE_END.split(chunk)
        for end in complete:
            self._append(end)
            line = self._take_line()
            if line:
                self._read_field(line)
                continue
            event = self._dispatch()
            if event is not None:
                yield event
        self._append(rest)

    def _append(self, part: bytes) -> None:
        self._line += part
        self._event_bytes += len(part)
        if self._event_bytes > self._max_event_bytes:
            raise ResponseFormatError(f"the server sent an event of more than {self._max_event_bytes} bytes")

    def _take_line(self) -> str:
        line = bytes(self._line)
        self._line.clear()
        if self._at_start:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._at_start = False
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ResponseFormatError(f"the event stream is not UTF-8: {error}") from error

    def _read_field(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif field == "id" and "\0" not in value:
            self._id = value
        # An empty field name is a comment (a keep-alive); the standard says to ignore "retry" here and unknown names.
        if not self._data:
            self._event_bytes = 0

    def _dispatch(self) -> ServerSentEvent | None:
        data, event = self._data, self._event or "message"
        self._data, self._event, self._event_bytes = [], "", 0
        if not data:
            return None
        return ServerSentEvent(data="\n".join(data), event=event, id=self._id)
