"""One streamed response while it arrives: when its texts came, what it says about tokens, and what went wrong."""

from __future__ import annotations

import json
from array import array


class Answer:
    """See above. ``error`` is a short code, for counting."""

    __slots__ = ("_body", "_tail", "ended", "error", "event_s", "output_tokens", "prompt_tokens", "status")

    def __init__(self) -> None:
        self.status = 0
        self.event_s = array("d")
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.error = ""
        self.ended = False
        """Whether the stream said that it is complete."""
        self._tail = b""
        self._body = b""

    def feed(self, data: bytes, now: float) -> None:
        """Some bytes of the body."""
        if self.status != 200:
            self._body += data
            return
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._read(line[5:].strip(), now)

    def finish(self) -> None:
        """The body is complete."""
        if self.status != 200:
            self.error = self.error or _error_code(self._body) or str(self.status)
        elif not self.ended and not self.error:
            self.error = "stream_broken"

    def _read(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.ended = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            self.error = "not_json"
            return
        if event.get("error"):
            self.error = _code_of(event["error"])
            return
        if usage := event.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens") or 0
            self.output_tokens = usage.get("completion_tokens") or 0
        for choice in event.get("choices") or ():
            part = choice.get("delta") or choice
            if part.get("content") or part.get("text") or part.get("reasoning_content"):
                self.event_s.append(now)
                break


def _error_code(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    return _code_of(answer.get("error")) if isinstance(answer, dict) else ""


def _code_of(error: object) -> str:
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "error")
    return "error"
