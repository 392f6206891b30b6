"""What is sent, when: the same plan gives the same requests at the same moments, in however many processes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from .lengths import Lengths
from .mix import Mix

# Words that tokenizers of English know whole, with the blank before them.
_ENGLISH = """
the of and to in is was for on that with as by at from this have are not they which one you were all her she
there would their we him been has when who will more no if out so said what up its about into than them can
only other new some could time these two may then do first any my now such like our over man me even most made
after also did many before must through back years where much your way well down should because each just
those people
"""
WORDS = _ENGLISH.split()


@dataclass(frozen=True)
class Slo:
    """What a user would call good, in milliseconds; None: not asked for."""

    first_token_ms: float | None = None
    per_token_ms: float | None = None
    request_ms: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.first_token_ms, self.per_token_ms, self.request_ms))


@dataclass(frozen=True)
class LoadPlan:
    """Requests to one server.

    Closed loop: ``concurrency`` streams, each sending its next request when the last has ended. Open loop: ``rate``
    requests a second whatever the server does, at moments of a gamma process whose shape is ``burstiness`` (1: Poisson;
    less: burstier). It ends after ``num_requests`` or when ``duration_s`` has passed; what runs then is finished.
    ``vocab_size``: prompts of completions as token ids below it; None: as words.
    """

    url: str
    models: tuple[str, ...]
    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    num_requests: int | None = None
    duration_s: float | None = None
    prompt_tokens: Lengths = field(default_factory=lambda: Lengths("128"))
    output_tokens: Lengths = field(default_factory=lambda: Lengths("128"))
    mix: Mix = field(default_factory=Mix)
    endpoint: Literal["chat", "completions"] = "chat"
    vocab_size: int | None = None
    api_key: str | None = field(default=None, repr=False)
    ignore_eos: bool = True
    temperature: float = 0.0
    warmup: int = 0
    timeout_s: float = 600.0
    processes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("give either a concurrency (closed loop) or a rate (open loop)")
        if self.num_requests is None and self.duration_s is None:
            raise ValueError("give a number of requests or a duration")
        numbers = (self.concurrency, self.rate, self.num_requests, self.duration_s, self.burstiness, self.processes)
        if any(number is not None and number <= 0 for number in numbers):
            raise ValueError(
                "concurrency, rate, burstiness, number of requests, duration and processes must be above zero"
            )
        if not self.models:
            raise ValueError("no model is named")
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ValueError(f"{self.url!r} is no address; write http://host:port")

    def request(self, index: int) -> PlannedRequest:
        """Request ``index``; negative ones are the warm-up's."""
        rng = random.Random(f"{self.seed} {index}")
        model = self.mix.choose(self.models, self._weights(), index, rng)
        prompt, output = self.prompt_tokens.draw(rng), self.output_tokens.draw(rng)
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": output,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": _text(rng, prompt)}]
        elif self.vocab_size is not None:
            body["prompt"] = [rng.randrange(self.vocab_size) for _ in range(prompt)]
        else:
            body["prompt"] = _text(rng, prompt)
        return PlannedRequest(index, model, json.dumps(body).encode())

    def arrivals(self) -> Iterator[tuple[int, float]]:
        """Open loop: every request's number and when it is due, in seconds from the start."""
        if self.rate is None:
            raise ValueError("a closed loop has no arrivals")
        rng = random.Random(f"{self.seed} arrivals")
        at, index = 0.0, 0
        while self.num_requests is None or index < self.num_requests:
            at += rng.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))
            if self.duration_s is not None and at >= self.duration_s:
                return
            yield index, at
            index += 1

    def _weights(self) -> list[float]:
        return _cached_weights(self.mix, len(self.models))


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, ready to be sent."""

    index: int
    model: str
    body: bytes


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


_weights_of: dict[tuple[str, int], list[float]] = {}


def _cached_weights(mix: Mix, num_models: int) -> list[float]:
    key = (mix.text, num_models)
    if key not in _weights_of:
        _weights_of[key] = mix.weights(num_models)
    return _weights_of[key]
