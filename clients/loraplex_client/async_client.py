"""The async client: `loraplex_client.client`, awaited.

async with AsyncLoraplex() as client:
    async with await client.chat("Tell me a story", stream=True) as stream:
        async for chunk in stream:
            print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import builtins
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, overload

import httpx

from . import calls
from .adapters import AsyncAdapters
from .calls import Messages
from .connection import AsyncConnection
from .endpoint import DEFAULT_TIMEOUT, Endpoint
from .streaming import AsyncStream
from .types import ChatCompletion, ChatCompletionChunk, Completion, ModelCard, Tokens, Version


class AsyncModels:
    """The names that requests may use as `model`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def list(self) -> builtins.list[ModelCard]:
        """The base and all adapters."""
        return await self._connection.send(calls.list_models())

    async def get(self, id: str) -> ModelCard:
        """One model. Raises NotFoundError."""
        return await self._connection.send(calls.get_model(id))


class AsyncLoraplex:
    """A client of one Loraplex server; belongs to one event loop.

    Arguments, defaults and errors are those of `Loraplex`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
        http_client: httpx.AsyncClient | None = None,
        sleep: Callable[[float], Awaitable[object]] | None = None,
    ) -> None:
        self._connection = AsyncConnection(
            Endpoint.resolve(base_url, api_key, admin_key, timeout),
            max_retries=max_retries,
            http_client=http_client,
            transport=transport,
            sleep=sleep,
        )
        self._base: str | None = None
        self.models = AsyncModels(self._connection)
        self.adapters = AsyncAdapters(self._connection)

    @property
    def base_url(self) -> str:
        """The server's address, without a trailing slash."""
        return self._connection.endpoint.base_url

    async def __aenter__(self) -> AsyncLoraplex:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._connection.aclose()

    @overload
    async def chat(
        self, messages: Messages, *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> ChatCompletion: ...
    @overload
    async def chat(
        self, messages: Messages, *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> AsyncStream[ChatCompletionChunk]: ...
    @overload
    async def chat(
        self, messages: Messages, *, model: str | None = None, stream: bool, **params: Any
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]: ...
    async def chat(
        self, messages: Messages, *, model: str | None = None, stream: bool = False, **params: Any
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """See `Loraplex.chat`."""
        model = model or await self.base_model()
        if stream:
            return await self._connection.stream(calls.chat_stream(messages, model, params))
        return await self._connection.send(calls.chat(messages, model, params))

    @overload
    async def completions(
        self, prompt: str | Sequence[Any], *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> Completion: ...
    @overload
    async def completions(
        self, prompt: str | Sequence[Any], *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> AsyncStream[Completion]: ...
    @overload
    async def completions(
        self, prompt: str | Sequence[Any], *, model: str | None = None, stream: bool, **params: Any
    ) -> Completion | AsyncStream[Completion]: ...
    async def completions(
        self, prompt: str | Sequence[Any], *, model: str | None = None, stream: bool = False, **params: Any
    ) -> Completion | AsyncStream[Completion]:
        """See `Loraplex.completions`."""
        model = model or await self.base_model()
        if stream:
            return await self._connection.stream(calls.completions_stream(prompt, model, params))
        return await self._connection.send(calls.completions(prompt, model, params))

    async def base_model(self) -> str:
        """See `Loraplex.base_model`."""
        if self._base is None:
            self._base = calls.base_model(await self.models.list())
        return self._base

    async def tokenize(self, text: Messages, *, model: str | None = None) -> Tokens:
        """See `Loraplex.tokenize`."""
        return await self._connection.send(calls.tokenize(text, model or await self.base_model()))

    async def detokenize(self, ids: Iterable[int], *, model: str | None = None) -> str:
        """See `Loraplex.detokenize`."""
        return await self._connection.send(calls.detokenize(ids, model or await self.base_model()))

    async def health(self) -> bool:
        """See `Loraplex.health`."""
        return await self._connection.send(calls.health())

    async def ready(self) -> bool:
        """See `Loraplex.ready`."""
        return await self._connection.send(calls.ready())

    async def version(self) -> Version:
        """See `Loraplex.version`."""
        return await self._connection.send(calls.version())

    async def metrics(self) -> str:
        """See `Loraplex.metrics`."""
        return await self._connection.send(calls.metrics())
