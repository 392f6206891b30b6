"""A request's answers as they come: submitted together, read together, given up together."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from loraplex_server.api.choice import Choice, Piece
from loraplex_server.api.connection import ClientGone
from loraplex_server.api.target import Target, target_of
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.engine.token_stream import Arrival
from loraplex_server.engine.worker import EngineStopped, Place, QueueFull
from loraplex_server.errors import ApiError
from loraplex_server.observer import Outcome
from loraplex_server.services import Services


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer that is wanted. ``keep_output`` False: only the prompt's scores are."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    keep_output: bool = True


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole request. A prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


def reserve_place(services: Services, model: str) -> Place:
    """A place in the queue, taken before the prompt is rendered: whoever gets none is turned away at little cost.

    Raises ApiError (unknown model), QueueFull, EngineStopped.
    """
    target = target_of(services, model)
    try:
        return services.worker.reserve()
    except (QueueFull, EngineStopped):
        observer = services.metrics.start(target.adapter, target.mode)
        observer.on_finish("rejected", seconds=0.0, prompt_tokens=0, output_tokens=0, queue_s=None)
        raise


class Generation:
    """All answers of one HTTP request: an async context that submits and gives up, and an async iterator between.

    Each step of the iterator yields what has arrived since the last one, one piece for each choice, so that a reader
    that is slow gets fewer and larger pieces. Leaving the context early frees the requests' places in the engine.
    """

    def __init__(
        self,
        services: Services,
        id: str,
        model: str,
        asks: Sequence[Ask],
        place: Place,
        *,
        choices_per_prompt: int,
        salt: str,
    ) -> None:
        self.id = id
        self.created_at = int(time.time())
        self.choices: list[Choice] = []
        self.first_token_s: float | None = None
        self._services = services
        self._model = model
        self._asks = asks
        self._choices_per_prompt = choices_per_prompt
        self._salt = salt
        self._place = place
        self._num_unfinished = len(asks)
        self._arrived: dict[Choice, None] = {}
        self._reader: asyncio.Future[None] | None = None
        self._last_arrival: dict[Choice, float] = {}
        self._outcome: Outcome | None = None

    async def __aenter__(self) -> Self:
        """Submit everything, or nothing. Raises ApiError (unknown model), QueueFull, EngineStopped."""
        self._place.release()
        # The name is resolved in the same breath as the submission: no unload can come between them.
        self.target: Target = target_of(self._services, self._model)
        self._observer = self._services.metrics.start(self.target.adapter, self.target.mode)
        self._submitted_at = time.perf_counter()
        try:
            for index, ask in enumerate(self._asks):
                self.choices.append(self._submit(index, ask))
        except BaseException as error:
            self._close("rejected" if isinstance(error, QueueFull | EngineStopped) else "error")
            raise
        for choice in self.choices:
            choice.stream.listen(partial(self._notice, choice))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if all(choice.finish_reason for choice in self.choices):
            self._close("length" if any(choice.finish_reason == "length" for choice in self.choices) else "stop")
        else:
            failed = isinstance(error, Exception) and not isinstance(error, ClientGone)
            self._close("error" if failed else "abort")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Piece]:
        """What has arrived since the last time. Raises ApiError when one of the answers fails."""
        if not self._num_unfinished:
            raise StopAsyncIteration
        if not self._arrived:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        arrived, self._arrived = self._arrived, {}
        now = time.perf_counter()
        pieces = []
        for choice in arrived:
            if choice.finish_reason is not None:
                continue
            arrivals = choice.stream.take()
            self._observe(choice, arrivals, now)
            piece = self._take(choice, arrivals)
            pieces.append(piece)
            if piece.finish_reason is not None:
                self._num_unfinished -= 1
        return pieces

    async def collect(self) -> list[list[Piece]]:
        """All pieces of each choice, when all have ended. Raises ApiError."""
        collected: list[list[Piece]] = [[] for _ in self.choices]
        async for pieces in self:
            for piece in pieces:
                collected[piece.index].append(piece)
        return collected

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        firsts = self.choices[:: self._choices_per_prompt]
        return Usage(
            prompt_tokens=sum(len(choice.prompt_ids) for choice in firsts),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=sum(choice.num_cached for choice in firsts),
        )

    @property
    def queue_s(self) -> float | None:
        """The longest wait before a first step; None before any."""
        return max((choice.queue_s for choice in self.choices if choice.queue_s is not None), default=None)

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it runs."""
        return self._outcome

    def headers(self, encode_s: float) -> dict[str, str]:
        """Who answers, and the times known by now: a stream's headers go out with its first token."""
        timings = {"encode": encode_s, "queue": self.queue_s, "first-token": self.first_token_s}
        if all(choice.finish_reason for choice in self.choices):
            timings["total"] = time.perf_counter() - self._submitted_at
        spans = [f"{name};dur={seconds * 1000:.1f}" for name, seconds in timings.items() if seconds is not None]
        return {
            "x-loraplex-adapter": self.target.label,
            "x-loraplex-mode": self.target.mode,
            "server-timing": ", ".join(spans),
        }

    def facts(self) -> dict[str, object]:
        """What the log says about it: numbers and names, nothing of the texts."""
        usage = self.usage
        return {
            "adapter": self.target.label,
            "outcome": self._outcome,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "choices": len(self.choices),
        }

    def _submit(self, index: int, ask: Ask) -> Choice:
        request = Request(f"{self.id}-{index}", ask.prompt_ids, ask.sampling, self.target.digest, self._salt)
        return Choice(
            index,
            ask.prompt_ids,
            self._services.worker.submit(request),
            self._services.tokenizer,
            ask.stops,
            min_tokens=ask.sampling.min_tokens,
            keep_output=ask.keep_output,
        )

    def _notice(self, choice: Choice) -> None:
        """Something has arrived; the reader wakes once for all that did."""
        self._arrived[choice] = None
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _take(self, choice: Choice, arrivals: Sequence[Arrival]) -> Piece:
        try:
            return choice.take(arrivals)
        except ApiError as error:
            if error.code == "adapter_load_failed":
                # Unloaded between its submission and its load: then there is no such model, and that is the answer.
                target_of(self._services, self._model)
            raise

    def _observe(self, choice: Choice, arrivals: Sequence[Arrival], now: float) -> None:
        num_tokens = sum([1 if isinstance(arrival, int) else len(arrival.token_ids) for arrival in arrivals])
        if not num_tokens:
            return
        before = self._last_arrival.get(choice)
        self._last_arrival[choice] = now
        if self.first_token_s is None:
            self.first_token_s = now - self._submitted_at
            self._observer.on_first_token(self.first_token_s)
        if before is not None:
            self._observer.on_tokens(num_tokens, now - before)

    def _close(self, outcome: Outcome) -> None:
        self._outcome = outcome
        for choice in self.choices:
            choice.stream.abort()
        usage = self.usage
        self._observer.on_finish(
            outcome,
            seconds=time.perf_counter() - self._submitted_at,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            queue_s=self.queue_s,
        )
