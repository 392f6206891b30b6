"""Answers as server-sent events."""

import json
from collections.abc import Sequence
from functools import partial
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex_server.api.choice import Piece
from loraplex_server.api.connection import ClientGone, while_connected
from loraplex_server.api.generation import Generation, Usage
from loraplex_server.api.request_log import note, note_failure
from loraplex_server.errors import to_api_error

__all__ = ["DONE", "Chunks", "EventStream", "compact", "event", "quoted"]

compact = partial(json.dumps, separators=(",", ":"))
"""JSON without blanks. ``quoted`` gives the same for a text alone, and faster."""

DONE = b"data: [DONE]\n\n"


class Chunks(Protocol):
    """Writes one kind of answer as events."""

    def open(self, generation: Generation) -> None:
        """The generation has begun; called once, before ``events``."""

    def events(self, pieces: Sequence[Piece]) -> bytes:
        """These pieces; empty if there is nothing to say."""

    def last(self, usage: Usage) -> bytes:
        """What follows the last piece, if anything."""


class EventStream(Response):
    """Sends a generation as it comes, one write for all that arrived together.

    The status goes out with the first token, so that what fails before it has a status of its own; what fails later is
    an error event. A client that leaves ends the generation at once.
    """

    def __init__(self, generation: Generation, chunks: Chunks, encode_s: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._generation = generation
        self._chunks = chunks
        self._encode_s = encode_s
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._generation as generation:
                self._chunks.open(generation)
                await while_connected(receive, self._send_all(send))
        except ClientGone:
            return
        except Exception as error:
            if not self._has_started:
                raise
            note_failure(scope, error)
            await self._send_last(send, event(to_api_error(error).body))
        finally:
            if self._generation.outcome is not None:
                note(scope, **self._generation.facts())

    async def _send_all(self, send: Send) -> None:
        to_events = self._chunks.events
        async for pieces in self._generation:
            events = to_events(pieces)
            if not self._has_started:
                await self._start(send)
            if events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
        await self._send_last(send, self._chunks.last(self._generation.usage))

    async def _start(self, send: Send) -> None:
        self.headers.update(self._generation.headers(self._encode_s))
        self._has_started = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send_last(self, send: Send, events: bytes) -> None:
        await send({"type": "http.response.body", "body": events + DONE, "more_body": False})


def event(body: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + compact(body).encode() + b"\n\n"
