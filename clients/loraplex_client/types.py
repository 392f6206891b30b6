"""What the server answers, typed. Fields that this version does not know are kept as attributes."""

from __future__ import annotations

from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """The base of every answer: a server newer than the client may add fields."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Served(BaseModel):
    """Who served a request and how long it took, from the response headers."""

    request_id: str | None = None
    adapter: str | None = None
    mode: str | None = None
    server_timing: str | None = None

    @classmethod
    def from_headers(cls, headers: httpx.Headers) -> Served:
        """Read `x-request-id`, `x-loraplex-adapter`, `x-loraplex-mode` and `server-timing`."""
        return cls(
            request_id=headers.get("x-request-id"),
            adapter=headers.get("x-loraplex-adapter"),
            mode=headers.get("x-loraplex-mode"),
            server_timing=headers.get("server-timing"),
        )


class ServedReply(Reply):
    """An answer that also says who served it."""

    served: Served = Field(default_factory=Served, exclude=True)


class Usage(Reply):
    """Tokens of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None
    completion_tokens_details: dict[str, Any] | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed again."""
        return int((self.prompt_tokens_details or {}).get("cached_tokens") or 0)


class Message(Reply):
    """One message; may be appended to a conversation as it is."""

    role: str = "assistant"
    content: str | None = None


class Choice(Reply):
    """One of the `n` answers of a chat completion."""

    index: int = 0
    message: Message = Field(default_factory=Message)
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatCompletion(ServedReply):
    """A whole chat answer."""

    id: str
    object: str = "chat.completion"
    created: int = 0
    model: str = ""
    choices: list[Choice] = Field(default_factory=list)
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return (self.choices[0].message.content or "") if self.choices else ""


class Delta(Reply):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None


class ChunkChoice(Reply):
    """One choice's part of a chunk."""

    index: int = 0
    delta: Delta = Field(default_factory=Delta)
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatCompletionChunk(Reply):
    """One event of a streamed chat answer; the last one may carry only `usage`."""

    id: str
    object: str = "chat.completion.chunk"
    created: int = 0
    model: str = ""
    choices: list[ChunkChoice] = Field(default_factory=list)
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @property
    def text(self) -> str:
        """What this chunk adds to the first choice; empty if it adds nothing to it."""
        return "".join(choice.delta.content or "" for choice in self.choices if choice.index == 0)


class CompletionChoice(Reply):
    """One of the answers of a text completion, or its part of a chunk."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class Completion(ServedReply):
    """A whole text completion, or one event of a streamed one."""

    id: str
    object: str = "text_completion"
    created: int = 0
    model: str = ""
    choices: list[CompletionChoice] = Field(default_factory=list)
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


class ModelCard(Reply):
    """A name that requests may use as `model`: the base (no parent) or an adapter."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = ""
    parent: str | None = None
    root: str | None = None
    max_model_len: int | None = None
    loraplex: dict[str, Any] | None = None


class ModelList(Reply):
    """All models."""

    data: list[ModelCard]


class Tokens(Reply):
    """The token ids of a text or a rendered conversation."""

    tokens: list[int]
    count: int = 0
    max_model_len: int | None = None


class Version(Reply):
    """The server's version."""

    version: str


class Ranks(Reply):
    """The smallest and largest rank over an adapter's modules."""

    min: int
    max: int


class AdapterVersion(Reply):
    """One upload under a name; older ones can be made current again."""

    version: int | str
    digest: str
    created_at: float = 0
    source: str | None = None
    current: bool = False


class Adapter(Reply):
    """An adapter as the server knows it. `residency` is the fastest tier it is in: gpu, host or disk.

    Units: `created_at` and `updated_at` are Unix times in seconds.
    """

    name: str
    digest: str
    object: str = "adapter"
    version: int | str | None = None
    base: str | None = None
    ranks: Ranks | None = None
    rank: int = 0
    target_modules: list[str] = Field(default_factory=list)
    features: list[str] = Field(default_factory=list)
    num_parameters: int = 0
    num_bytes: int = 0
    residency: str = "disk"
    pinned: bool = False
    default_mode: str | None = None
    aliases: list[str] = Field(default_factory=list)
    requests_running: int = 0
    requests_waiting: int = 0
    source: str | None = None
    created_at: float = 0
    updated_at: float = 0
    versions: list[AdapterVersion] = Field(default_factory=list)


class AdapterList(Reply):
    """All adapters."""

    data: list[Adapter]


class AdapterDeleted(Reply):
    """The answer to a delete, sent when the last request has left the adapter and its memory is free."""

    name: str
    object: str = "adapter.deleted"
    deleted: bool = True
    digest: str | None = None
    freed_bytes: int = 0
