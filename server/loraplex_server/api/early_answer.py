"""Ends a connection whose request was answered before its body had come, so that nobody sends a gigabyte for nothing."""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A rest up to this size is read to its end and the connection lives on; its length must be known.
_SMALL_BYTES = 1 << 20
# A client that is still sending gets this much longer to notice the answer: a connection closed on arriving data is reset,
# and a reset can overtake the answer.
_LINGER_BYTES, _LINGER_S = 16 << 20, 2.0


class EarlyAnswer:
    """ASGI middleware, outermost: after an early answer to a large body it reads on for a moment, then hangs up.

    Without it the rest is received and thrown away, however long it is.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _may_be_large(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        ended = closes = False

        async def receive_body() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or not message.get("more_body", False)
            return message

        async def send_answer(message: Message) -> None:
            nonlocal closes
            if message["type"] == "http.response.start" and not ended:
                closes = True
                MutableHeaders(scope=message)["connection"] = "close"
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if last and closes and not ended:
                await send({**message, "more_body": True})
                await _linger(receive_body)
                await send({"type": "http.response.body", "body": b""})
            else:
                await send(message)

        await self._app(scope, receive_body, send_answer)


def _may_be_large(headers: Headers) -> bool:
    length = headers.get("content-length", "")
    if length.isdigit():
        return int(length[:20]) > _SMALL_BYTES
    return "transfer-encoding" in headers


async def _linger(receive: Receive) -> None:
    num_bytes = 0
    try:
        async with asyncio.timeout(_LINGER_S):
            while num_bytes < _LINGER_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
