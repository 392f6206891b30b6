"""The blocking client.

    with Loraplex(base_url="http://127.0.0.1:8000") as client:
        print(client.chat("Hello", model="my-adapter").text)
        with client.chat("Tell me a story", stream=True) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)

Parameters of `chat` and `completions` beyond those named go into the request as they are: `max_tokens`, `temperature`,
`adapter_mode`, `adapters` and whatever else the server takes.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, overload

import httpx

from . import calls
from .adapters import Adapters
from .calls import Messages
from .connection import Connection
from .endpoint import DEFAULT_TIMEOUT, Endpoint
from .streaming import Stream
from .types import ChatCompletion, ChatCompletionChunk, Completion, ModelCard, Tokens, Version


class Models:
    """The names that requests may use as `model`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> builtins.list[ModelCard]:
        """The base and all adapters."""
        return self._connection.send(calls.list_models())

    def get(self, id: str) -> ModelCard:
        """One model. Raises NotFoundError."""
        return self._connection.send(calls.get_model(id))


class Loraplex:
    """A client of one Loraplex server; may be shared by threads.

    What is not given comes from `LORAPLEX_BASE_URL`, `LORAPLEX_API_KEY` and `LORAPLEX_ADMIN_KEY`. `timeout` is in
    seconds. `http_client` brings your own connection pool (it stays yours to close), `transport` your own wire.
    All methods raise LoraplexError's subclasses.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
        http_client: httpx.Client | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._connection = Connection(
            Endpoint.resolve(base_url, api_key, admin_key, timeout),
            max_retries=max_retries,
            http_client=http_client,
            transport=transport,
            sleep=sleep,
        )
        self._base: str | None = None
        self.models = Models(self._connection)
        self.adapters = Adapters(self._connection)

    @property
    def base_url(self) -> str:
        """The server's address, without a trailing slash."""
        return self._connection.endpoint.base_url

    def __enter__(self) -> Loraplex:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._connection.close()

    # `params` stay untyped on purpose: the server bounds and names them, and a newer one may take more.
    @overload
    def chat(
        self, messages: Messages, *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> ChatCompletion: ...
    @overload
    def chat(
        self, messages: Messages, *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> Stream[ChatCompletionChunk]: ...
    @overload
    def chat(
        self, messages: Messages, *, model: str | None = None, stream: bool, **params: Any
    ) -> ChatCompletion | Stream[ChatCompletionChunk]: ...
    def chat(
        self, messages: Messages, *, model: str | None = None, stream: bool = False, **params: Any
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:
        """Answer a text or a conversation with the base or, if `model` names one, an adapter."""
        model = model or self.base_model()
        if stream:
            return self._connection.stream(calls.chat_stream(messages, model, params))
        return self._connection.send(calls.chat(messages, model, params))

    @overload
    def completions(
        self, prompt: str | Sequence[Any], *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> Completion: ...
    @overload
    def completions(
        self, prompt: str | Sequence[Any], *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> Stream[Completion]: ...
    @overload
    def completions(
        self, prompt: str | Sequence[Any], *, model: str | None = None, stream: bool, **params: Any
    ) -> Completion | Stream[Completion]: ...
    def completions(
        self, prompt: str | Sequence[Any], *, model: str | None = None, stream: bool = False, **params: Any
    ) -> Completion | Stream[Completion]:
        """Continue a text (or texts, or token ids) without a chat template."""
        model = model or self.base_model()
        if stream:
            return self._connection.stream(calls.completions_stream(prompt, model, params))
        return self._connection.send(calls.completions(prompt, model, params))

    def base_model(self) -> str:
        """The base's name, which calls without `model` use. Asked once: a server keeps its base while it runs."""
        if self._base is None:
            self._base = calls.base_model(self.models.list())
        return self._base

    def tokenize(self, text: Messages, *, model: str | None = None) -> Tokens:
        """The token ids of a text, or of a conversation with the chat template around it."""
        return self._connection.send(calls.tokenize(text, model or self.base_model()))

    def detokenize(self, ids: Iterable[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        return self._connection.send(calls.detokenize(ids, model or self.base_model()))

    def health(self) -> bool:
        """True if the server's process is up. Raises APIConnectionError if nothing listens."""
        return self._connection.send(calls.health())

    def ready(self) -> bool:
        """True if the server can serve requests: the model is loaded and it is not shutting down."""
        return self._connection.send(calls.ready())

    def version(self) -> Version:
        """The server's version."""
        return self._connection.send(calls.version())

    def metrics(self) -> str:
        """The server's metrics in Prometheus text format."""
        return self._connection.send(calls.metrics())
