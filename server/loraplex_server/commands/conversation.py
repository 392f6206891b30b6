"""A conversation in a terminal: what was said, and one streamed answer to it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from .rendering import printable

if TYPE_CHECKING:
    from loraplex_client import Loraplex


@dataclass
class Conversation:
    """What is sent with the next question. `params` go into every request."""

    model: str | None
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The system prompt, if any, and all turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]


@dataclass(frozen=True)
class Timing:
    """How long one answer took. `tokens_per_s` counts from the first token; None if there was at most one."""

    first_token_s: float | None
    tokens_per_s: float | None
    num_tokens: int
    stopped: bool

    def __str__(self) -> str:
        parts = [] if self.first_token_s is None else [f"first token {self.first_token_s * 1000:.0f} ms"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        parts.append(f"{self.num_tokens} tokens")
        return ", ".join([*parts, "stopped"] if self.stopped else parts)


def ask(client: Loraplex, conversation: Conversation, question: str) -> Timing:
    """Print the answer as it streams in and add both to the conversation.

    Ctrl-C stops the answer, and what was said stays. A question without an answer is taken back.
    Raises LoraplexError.
    """
    conversation.turns.append({"role": "user", "content": question})
    texts: list[str] = []
    try:
        timing = _print_answer(client, conversation, texts)
    except BaseException:
        conversation.turns.pop()
        raise
    finally:
        if texts and not texts[-1].endswith("\n"):
            typer.echo()
    if texts:
        conversation.turns.append({"role": "assistant", "content": "".join(texts)})
    else:
        conversation.turns.pop()
    return timing


def _print_answer(client: Loraplex, conversation: Conversation, texts: list[str]) -> Timing:
    started_s = time.perf_counter()
    first_s = last_s = None
    num_tokens, stopped = 0, False
    try:
        with client.chat(
            conversation.messages(),
            model=conversation.model,
            stream=True,
            stream_options={"include_usage": True},
            **conversation.params,
        ) as stream:
            for chunk in stream:
                if chunk.text:
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
                    texts.append(chunk.text)
                    typer.echo(printable(chunk.text), nl=False)
                # A chunk is about a token; the usage at the end says it exactly.
                num_tokens = chunk.usage.completion_tokens if chunk.usage else len(texts)
    except KeyboardInterrupt:
        stopped = True
    if first_s is None or last_s is None:
        return Timing(None, None, num_tokens, stopped)
    tokens_per_s = (num_tokens - 1) / (last_s - first_s) if num_tokens > 1 and last_s > first_s else None
    return Timing(first_s - started_s, tokens_per_s, num_tokens, stopped)
