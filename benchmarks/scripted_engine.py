"""An engine without a model: it hands out made-up tokens at a set rate, as fast as it can if there is none."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.host import EngineFacts, Progress
from loraplex_server.engine.messages import (
    Abort,
    Command,
    Done,
    EngineStats,
    ForgetPrefixes,
    Release,
    StepReport,
    Submit,
    TokenOutput,
    Warm,
)

_NUM_IDS = 4096
_STATS_EVERY_S = 0.05


class ScriptedEngine:
    """Has the surface of ``engine.Engine``: every running request gets one token a step.

    ``tokens_per_s`` over all requests, 0 for no limit; token ids are drawn from ``vocab``, always in the same order.
    """

    def __init__(self, vocab: tuple[int, ...], tokens_per_s: float) -> None:
        rng = random.Random(0)
        self._ids = [rng.choice(vocab) for _ in range(_NUM_IDS)]
        self._tokens_per_s = tokens_per_s
        self._running: dict[str, tuple[int, int]] = {}  # request id: tokens given, tokens wanted
        self._done: list[Done] = []
        self._due = 0.0
        self._stats_at = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._done)

    @property
    def is_waiting(self) -> bool:
        return False

    def handle(self, command: Command) -> None:
        match command:
            case Submit(request):
                self._running[request.id] = (0, request.sampling.max_tokens)
            case Abort(request_id):
                self._running.pop(request_id, None)
            case Warm(ticket, _) | Release(ticket, _) | ForgetPrefixes(ticket):
                self._done.append(Done(ticket))

    def step(self) -> StepReport:
        begun = time.perf_counter()
        self._await_turn(begun)
        outputs = []
        for request_id, (given, wanted) in list(self._running.items()):
            is_first, is_last = given == 0, given + 1 >= wanted
            outputs.append(
                TokenOutput(
                    request_id,
                    (self._ids[(given + hash(request_id)) % _NUM_IDS],),
                    finish_reason="length" if is_last else None,
                    queue_s=0.0 if is_first else None,
                    cached_tokens=0 if is_first else None,
                )
            )
            if is_last:
                del self._running[request_id]
            else:
                self._running[request_id] = (given + 1, wanted)
        done, self._done = tuple(self._done), []
        now = time.perf_counter()
        stats = None
        if done or not self._running or now - self._stats_at >= _STATS_EVERY_S:
            self._stats_at = now
            stats = EngineStats(num_running=len(self._running), num_base_running=len(self._running))
        return StepReport(
            outputs=tuple(outputs), done=done, step_s=now - begun, num_decode_tokens=len(outputs), stats=stats
        )

    def close(self) -> None:
        self._running.clear()

    def _await_turn(self, now: float) -> None:
        if not self._tokens_per_s or not self._running:
            return
        # Late steps do not make the next ones come faster: a GPU does not catch up either.
        self._due = max(self._due + len(self._running) / self._tokens_per_s, now)
        if self._due > now:
            time.sleep(self._due - now)


@dataclass(frozen=True)
class ScriptedRecipe:
    """See ``host.EngineRecipe``; it is its own loaded base."""

    vocab: tuple[int, ...]
    tokens_per_s: float

    def enter_process(self) -> None:
        return None

    def load(self, progress: Progress | None) -> "ScriptedRecipe":
        return self

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(BaseShape("llama", 1, {}, max(self.vocab) + 1, 8, "5c" * 32), 1 << 20)

    def build(self, wake: Callable[[], None]) -> ScriptedEngine:
        return ScriptedEngine(self.vocab, self.tokens_per_s)
