"""One answer in the making: tokens from the engine in, certain text and scored tokens out."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from loraplex_server.engine.messages import Failure, TokenOutput
from loraplex_server.engine.sequence import TokenLogprob
from loraplex_server.engine.token_stream import Arrival, TokenStream
from loraplex_server.errors import failure_error
from loraplex_server.stop_strings import StopStrings
from loraplex_server.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probability. ``offset``: where it begins in the answer's text, in characters."""

    score: TokenLogprob
    offset: int


@dataclass(slots=True)  # not frozen: one is made for every token, in half the time
class Piece:
    """What one choice has to say now. ``finish_reason`` marks its last piece."""

    index: int
    text: str
    scored: Sequence[ScoredToken]
    finish_reason: FinishReason | None


class Choice:
    """One request to the engine and the text it becomes.

    ``keep_output`` False: only the prompt's scores are wanted, so that what is generated is dropped.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: tuple[int, ...],
        stream: TokenStream,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        min_tokens: int = 0,
        keep_output: bool = True,
    ) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.stream = stream
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self.num_cached = 0
        self.queue_s: float | None = None
        self.prompt_scores: list[TokenLogprob] = []
        self._keep_output = keep_output
        self._min_tokens = min_tokens
        self._detokenizer = tokenizer.detokenizer()
        self._has_stops = bool(stops)
        self._stops = StopStrings(stops)
        self._num_decoded_chars = 0
        self._num_given_chars = 0
        self._undecided: deque[tuple[ScoredToken, int]] = deque()
        self._given: list[str] = []

    def take(self, arrivals: Iterable[Arrival]) -> Piece:
        """Read what has come from the engine, in order. Raises ApiError if it reports a failure."""
        for arrival in arrivals:
            if self.finish_reason is not None:
                break
            if isinstance(arrival, int):
                self._take_token(arrival)
            else:
                self._take(arrival)
        text, self._given = "".join(self._given), []
        return Piece(self.index, text, self._decided() if self._undecided else (), self.finish_reason)

    def _take_token(self, token_id: int) -> None:
        """A token without a score, and nothing else: nearly all there ever is."""
        if not self._keep_output:
            return
        self.num_tokens += 1
        text = self._detokenizer.push_token(token_id)
        self._num_decoded_chars += len(text)
        if not self._has_stops:
            self._append(text)
        elif text and self._give(text):
            self._stop()

    def _take(self, output: TokenOutput) -> None:
        if output.failure is not None or output.finish_reason in ("abort", "error"):
            raise failure_error(output.failure or Failure("engine_error", "the engine gave up this request"))
        if output.queue_s is not None:
            self.queue_s = output.queue_s
        if output.cached_tokens is not None:
            self.num_cached = output.cached_tokens
        self.prompt_scores += output.prompt_logprobs
        if not self._keep_output:
            self.finish_reason = None if output.finish_reason is None else "length"
        elif self._read(output):
            self._stop()
        elif output.finish_reason is not None:
            stopped = self._finish_text() or output.finish_reason == "stop"
            self.finish_reason = "stop" if stopped else "length"

    def _stop(self) -> None:
        """A stop string has ended the text."""
        self.finish_reason = "stop"
        self.stream.abort()

    def _read(self, output: TokenOutput) -> bool:
        """Take in new tokens; True if a stop string ended the text."""
        ids = output.token_ids if output.stop_token_id is None else output.token_ids[:-1]
        for position, token_id in enumerate(ids):
            self.num_tokens += 1
            text = self._detokenizer.push_token(token_id)
            begin, self._num_decoded_chars = self._num_decoded_chars, self._num_decoded_chars + len(text)
            if output.logprobs:
                self._undecided.append((ScoredToken(output.logprobs[position], begin), self._num_decoded_chars))
            if text and self._give(text):
                return True
        self.num_tokens += len(output.token_ids) - len(ids)
        return False

    def _finish_text(self) -> bool:
        """Give out what is held back; True if a stop string is in it."""
        rest = self._detokenizer.flush()
        self._num_decoded_chars += len(rest)
        if rest and self._give(rest):
            return True
        self._append(self._stops.flush())
        return False

    def _give(self, text: str) -> bool:
        """Append text up to a stop string; True if there is one. None counts before ``min_tokens``."""
        if self.num_tokens <= self._min_tokens:
            self._append(text)
            return False
        text, stopped = self._stops.push(text)
        self._append(text)
        return stopped

    def _append(self, text: str) -> None:
        if text:
            self._given.append(text)
            self._num_given_chars += len(text)

    def _decided(self) -> list[ScoredToken]:
        """The scored tokens whose text has been given out; those cut off by a stop string are dropped."""
        decided: list[ScoredToken] = []
        given = self._num_given_chars
        cut = self.finish_reason is not None and self._num_decoded_chars > given
        while self._undecided:
            token, end = self._undecided[0]
            if end > given and (self.finish_reason is None or (cut and token.offset >= given)):
                break
            decided.append(token)
            self._undecided.popleft()
        return decided
