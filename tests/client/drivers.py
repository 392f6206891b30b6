"""Run one scenario through the blocking or the async client, against scripted answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import httpx

from loraplex_client import AsyncLoraplex, Loraplex

BASE_URL = "http://loraplex.test:8000"

Answer = httpx.Response | Exception


class Script:
    """Answers requests in order, the last answer forever; keeps what was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.bodies: list[bytes] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.bodies.append(request.content)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def json(self, index: int = -1) -> Any:
        return json.loads(self.bodies[index])


class Driver:
    """Calls one method of a fresh client of one kind; records the pauses it makes instead of making them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.pauses_s: list[float] = []

    def call(self, script: Script, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._run(script, lambda client: attrgetter(method)(client)(*args, **kwargs))

    def stream(self, script: Script, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """All chunks of a streamed call."""
        if self.kind == "sync":
            with self._sync(script) as client, attrgetter(method)(client)(*args, stream=True, **kwargs) as stream:
                return list(stream)

        async def collect() -> list[Any]:
            async with (
                self._async(script) as client,
                await attrgetter(method)(client)(*args, stream=True, **kwargs) as stream,
            ):
                return [chunk async for chunk in stream]

        return asyncio.run(collect())

    def _run(self, script: Script, use: Callable[[Any], Any]) -> Any:
        if self.kind == "sync":
            with self._sync(script) as client:
                return use(client)

        async def main() -> Any:
            async with self._async(script) as client:
                return await use(client)

        return asyncio.run(main())

    def _sync(self, script: Script) -> Loraplex:
        return Loraplex(
            BASE_URL,
            api_key="user-key",
            admin_key="admin-key",
            transport=httpx.MockTransport(script),
            sleep=self.pauses_s.append,
        )

    def _async(self, script: Script) -> AsyncLoraplex:
        async def sleep(pause_s: float) -> None:
            self.pauses_s.append(pause_s)

        return AsyncLoraplex(
            BASE_URL,
            api_key="user-key",
            admin_key="admin-key",
            transport=httpx.MockTransport(script),
            sleep=sleep,
        )


def chat_answer(text: str = "hi") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "base",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }


def chat_chunk(text: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "model": "base", "choices": [{"index": 0, "delta": {"content": text}}]}


def events(*payloads: dict[str, Any], done: bool = True) -> bytes:
    """Payloads as a server sends them."""
    lines = [f"data: {json.dumps(payload)}\n\n" for payload in payloads]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def event_stream(content: bytes, **headers: str) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8", **headers}, content=content)


def error_answer(status_code: int, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return httpx.Response(status_code, headers=headers, json={"error": {"message": "no", **fields}})


def adapter_json(name: str = "pirate", **fields: Any) -> dict[str, Any]:
    digest = "sha256:" + "a" * 64
    return {
        "object": "adapter",
        "name": name,
        "digest": digest,
        "version": 2,
        "base": "tiny-llama",
        "ranks": {"min": 4, "max": 8},
        "rank": 8,
        "target_modules": ["q_proj", "v_proj"],
        "features": [],
        "num_parameters": 4096,
        "num_bytes": 8192,
        "residency": "gpu",
        "pinned": False,
        "default_mode": "auto",
        "aliases": [],
        "requests_running": 1,
        "requests_waiting": 0,
        "source": "upload",
        "created_at": 1_700_000_000,
        "updated_at": 1_700_000_100,
        "versions": [
            {
                "version": 1,
                "digest": "sha256:" + "b" * 64,
                "created_at": 1_700_000_000,
                "source": "upload",
                "current": False,
            },
            {"version": 2, "digest": digest, "created_at": 1_700_000_100, "source": "upload", "current": True},
        ],
        **fields,
    }
