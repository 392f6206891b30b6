"""Every call of the API as a value: its request and how its answer is read. Both clients send these.

Nothing here does I/O; `loraplex_client.client` and `loraplex_client.async_client` do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from .errors import ResponseFormatError
from .types import (
    Adapter,
    AdapterDeleted,
    AdapterList,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ModelCard,
    ModelList,
    Reply,
    Served,
    ServedReply,
    Tokens,
    Version,
)
from .upload import AdapterFiles

T = TypeVar("T")
R = TypeVar("R", bound=Reply)
S = TypeVar("S", bound=ServedReply)

Messages = str | Sequence[Mapping[str, Any] | BaseModel]
"""A user's text, or a conversation: dicts as OpenAI's API takes them, or `Message`s from earlier answers."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One HTTP call. `parse` reads a 2xx answer, or one whose status is in `also_accepts`."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    json: Mapping[str, Any] | None = None
    form: Mapping[str, str] | None = None
    files: AdapterFiles | None = None
    admin: bool = False
    stream: bool = False
    retry: bool = True
    also_accepts: tuple[int, ...] = ()

    def accepts(self, response: httpx.Response) -> bool:
        """True if `parse` is meant to read this answer."""
        return response.is_success or response.status_code in self.also_accepts


def chat(messages: Messages, model: str, params: Mapping[str, Any]) -> Call[ChatCompletion]:
    """`POST /v1/chat/completions`, answered whole."""
    body = {"model": model, "messages": message_list(messages), **params}
    return Call("POST", "/v1/chat/completions", served_reply(ChatCompletion), json=body)


def chat_stream(
    messages: Messages, model: str, params: Mapping[str, Any]
) -> Call[Callable[[str], ChatCompletionChunk]]:
    """`POST /v1/chat/completions`, answered as events; parses to the reader of one event's data."""
    body = {"model": model, "messages": message_list(messages), **params, "stream": True}
    return Call("POST", "/v1/chat/completions", _event_reader(ChatCompletionChunk), json=body, stream=True)


def completions(prompt: object, model: str, params: Mapping[str, Any]) -> Call[Completion]:
    """`POST /v1/completions`, answered whole."""
    body = {"model": model, "prompt": prompt, **params}
    return Call("POST", "/v1/completions", served_reply(Completion), json=body)


def completions_stream(prompt: object, model: str, params: Mapping[str, Any]) -> Call[Callable[[str], Completion]]:
    """`POST /v1/completions`, answered as events."""
    body = {"model": model, "prompt": prompt, **params, "stream": True}
    return Call("POST", "/v1/completions", _event_reader(Completion), json=body, stream=True)


def list_models() -> Call[list[ModelCard]]:
    """`GET /v1/models`."""
    return Call("GET", "/v1/models", lambda response: _validated(ModelList, response.content).data)


def get_model(id: str) -> Call[ModelCard]:
    """`GET /v1/models/{id}`."""
    return Call("GET", f"/v1/models/{_segment(id)}", reply(ModelCard))


def tokenize(text: Messages, model: str) -> Call[Tokens]:
    """`POST /tokenize`: a text as it is, or a conversation through the chat template."""
    content = {"prompt": text} if isinstance(text, str) else {"messages": message_list(text)}
    return Call("POST", "/tokenize", reply(Tokens), json={"model": model, **content})


def detokenize(ids: Iterable[int], model: str) -> Call[str]:
    """`POST /detokenize`."""
    return Call("POST", "/detokenize", _prompt_field, json={"model": model, "tokens": list(ids)})


def health() -> Call[bool]:
    """`GET /health`: is the process up. Asked once, so that a caller who polls sees each answer."""
    return Call("GET", "/health", _is_success, retry=False, also_accepts=(503,))


def ready() -> Call[bool]:
    """`GET /ready`: can it serve requests now."""
    return Call("GET", "/ready", _is_success, retry=False, also_accepts=(503,))


def version() -> Call[Version]:
    """`GET /version`."""
    return Call("GET", "/version", reply(Version))


def metrics() -> Call[str]:
    """`GET /metrics`, in Prometheus text format."""
    return Call("GET", "/metrics", _text)


def list_adapters() -> Call[list[Adapter]]:
    """`GET /v1/adapters`."""
    return Call("GET", "/v1/adapters", lambda response: _validated(AdapterList, response.content).data, admin=True)


def show_adapter(name: str) -> Call[Adapter]:
    """`GET /v1/adapters/{name}`."""
    return Call("GET", f"/v1/adapters/{_segment(name)}", reply(Adapter), admin=True)


def upload_adapter(files: AdapterFiles, name: str | None, replace: bool, pinned: bool) -> Call[Adapter]:
    """`POST /v1/adapters` with the files themselves."""
    form = {"name": name or files.default_name, "replace": _flag(replace), "pinned": _flag(pinned)}
    return Call("POST", "/v1/adapters", reply(Adapter), form=form, files=files, admin=True)


def load_adapter(source: str, name: str, replace: bool, pinned: bool) -> Call[Adapter]:
    """`POST /v1/adapters` with a source that the server reads itself."""
    body = {"name": name, "source": source, "replace": replace, "pinned": pinned}
    return Call("POST", "/v1/adapters", reply(Adapter), json=body, admin=True)


def update_adapter(name: str, **changes: object) -> Call[Adapter]:
    """`PATCH /v1/adapters/{name}`; a change that is None is left out.

    Raises ValueError: nothing would change.
    """
    body = {key: value for key, value in changes.items() if value is not None}
    if not body:
        raise ValueError(f"nothing to update; give one of {', '.join(changes)}")
    return Call("PATCH", f"/v1/adapters/{_segment(name)}", reply(Adapter), json=body, admin=True)


def delete_adapter(name: str) -> Call[AdapterDeleted]:
    """`DELETE /v1/adapters/{name}`; answered when the adapter's last request has ended."""
    return Call("DELETE", f"/v1/adapters/{_segment(name)}", reply(AdapterDeleted), admin=True)


def base_model(models: Sequence[ModelCard]) -> str:
    """The base's name: the first model that is nobody's child.

    Raises ResponseFormatError: the server lists none.
    """
    for card in models:
        if card.parent is None:
            return card.id
    raise ResponseFormatError("the server lists no base model; pass model=")


def message_list(messages: Messages) -> list[dict[str, Any]]:
    """A conversation as JSON; a bare text is the user's first message."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [
        message.model_dump(exclude_none=True) if isinstance(message, BaseModel) else dict(message)
        for message in messages
    ]


def reply(model: type[R]) -> Callable[[httpx.Response], R]:
    """A parser of JSON answers of one type; it raises ResponseFormatError."""
    return lambda response: _validated(model, response.content)


def served_reply(model: type[S]) -> Callable[[httpx.Response], S]:
    """As `reply`, and the answer's `served` says who served it."""

    def parse(response: httpx.Response) -> S:
        answer = _validated(model, response.content)
        answer.served = Served.from_headers(response.headers)
        return answer

    return parse


def _event_reader(model: type[R]) -> Callable[[httpx.Response], Callable[[str], R]]:
    return lambda _response: lambda data: _validated(model, data)


def _validated(model: type[R], content: bytes | str) -> R:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResponseFormatError(f"the server's answer is no {model.__name__}: {where} {first['msg']}") from error


def _prompt_field(response: httpx.Response) -> str:
    try:
        return str(json.loads(response.content)["prompt"])
    except (ValueError, KeyError, TypeError) as error:
        raise ResponseFormatError("the server's answer has no `prompt`") from error


def _is_success(response: httpx.Response) -> bool:
    return response.is_success


def _text(response: httpx.Response) -> str:
    return response.text


def _segment(name: str) -> str:
    """One path segment. An empty one would turn `DELETE one` into another route."""
    if not name.strip(". "):
        raise ValueError(f"{name!r} is not a name")
    return quote(name, safe="")


def _flag(value: bool) -> str:
    return "true" if value else "false"
