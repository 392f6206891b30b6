"""Engines for hosts to run, without a base to load."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.host import EngineFacts, Progress, StepEngine
from loraplex_server.engine.messages import (
    Abort,
    AdapterLoad,
    AdapterState,
    Command,
    Done,
    EngineStats,
    Failure,
    ForgetPrefixes,
    Pin,
    Release,
    StepReport,
    Submit,
    TokenOutput,
    Warm,
)

FACTS = EngineFacts(BaseShape("llama", 1, {"q_proj": (16, 16)}, 32, 16, "test"), 256)

# Prompts that begin with these make the counting engine do more than count.
RAISES, DIES = -1, -2


@dataclass(frozen=True)
class Given:
    """A recipe for an engine of this process: what ``build`` makes."""

    build: Callable[[Callable[[], None]], StepEngine]
    facts: EngineFacts = FACTS

    def enter_process(self) -> None:
        raise AssertionError("no process was to be made")

    def load(self, progress: Progress | None) -> "Given":
        return self


@dataclass(frozen=True)
class CountingRecipe:
    """A recipe for a ``CountingEngine`` wherever it runs; ``load_error`` or ``build_error`` is raised on the way.

    ``says_when_closed``: a file that the engine makes when it is closed.
    """

    load_error: BaseException | None = None
    build_error: BaseException | None = None
    load_dies: bool = False
    step_s: float = 0.0
    says_when_closed: str | None = None

    def enter_process(self) -> None:
        return None

    def load(self, progress: Progress | None) -> "CountingRecipe":
        if self.load_error is not None:
            raise self.load_error
        if self.load_dies:
            os.abort()
        if progress is not None:
            progress(1, 2)
            progress(2, 2)
        return self

    @property
    def facts(self) -> EngineFacts:
        return FACTS

    def build(self, wake: Callable[[], None]) -> "CountingEngine":
        if self.build_error is not None:
            raise self.build_error
        return CountingEngine(self)


class Holding(Exception):
    """Holds what cannot be sent to another process."""

    def __init__(self) -> None:
        super().__init__("an error with a lambda in it", lambda: None)

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class UnsendableRecipe(CountingRecipe):
    """Raises what cannot be sent."""

    def load(self, progress: Progress | None) -> CountingRecipe:
        raise Holding


class CountingEngine:
    """Answers every request with 0, 1, 2, ... one token a step. Knows the adapters "a" and "broken"."""

    def __init__(self, recipe: CountingRecipe) -> None:
        self._recipe = recipe
        self._given: dict[str, int] = {}
        self._submits: dict[str, Submit] = {}
        self._failed: list[TokenOutput] = []
        self._done: list[Done] = []
        self._loads: list[AdapterLoad] = []
        self._releasing: list[Release] = []
        self._states: dict[str, AdapterState] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._given or self._failed or self._done or self._loads)

    @property
    def is_waiting(self) -> bool:
        return bool(self._releasing)

    def handle(self, command: Command) -> None:
        match command:
            case Submit(request):
                if request.prompt_ids[:1] == (RAISES,):
                    raise ZeroDivisionError("division by zero")
                if request.prompt_ids[:1] == (DIES,):
                    os.abort()
                if request.adapter == "broken":
                    failure = Failure("adapter_load_failed", "there is no such file")
                    self._failed.append(TokenOutput(request.id, (), finish_reason="error", failure=failure))
                    return
                self._submits[request.id] = command
                self._given[request.id] = 0
            case Abort(request_id):
                self._given.pop(request_id, None)
            case Warm(ticket, digest):
                failure_or_none = Failure("adapter_load_failed", "no such file") if digest == "broken" else None
                self._done.append(Done(ticket, failure_or_none))
                if failure_or_none is None:
                    self._states[digest] = AdapterState("gpu", 100)
                    self._loads.append(AdapterLoad(digest, "host_to_gpu", 0.001, 100))
            case Pin(digest, pinned):
                self._states[digest] = AdapterState("gpu", 100, pinned=pinned)
            case Release():
                self._releasing.append(command)
            case ForgetPrefixes(ticket):
                self._done.append(Done(ticket))

    def step(self) -> StepReport:
        time.sleep(self._recipe.step_s if self._given else 0.0)
        outputs, self._failed = self._failed, []
        for request_id, number in list(self._given.items()):
            outputs.append(self._count(request_id, number))
        self._release_unused()
        done, self._done = self._done, []
        loads, self._loads = self._loads, []
        stats = EngineStats(num_running=len(self._given), adapters=dict(self._states))
        return StepReport(tuple(outputs), done=tuple(done), loads=tuple(loads), step_s=1e-6, stats=stats)

    def close(self) -> None:
        for request_id in self._given:
            failure = Failure("shutting_down", "the server is shutting down")
            self._failed.append(TokenOutput(request_id, (), finish_reason="error", failure=failure))
        self._given.clear()
        if self._recipe.says_when_closed:
            with open(self._recipe.says_when_closed, "w", encoding="utf-8") as file:
                file.write("closed")

    def _count(self, request_id: str, number: int) -> TokenOutput:
        is_last = number + 1 >= self._submits[request_id].request.sampling.max_tokens
        if is_last:
            del self._given[request_id]
        else:
            self._given[request_id] = number + 1
        facts: dict[str, Any] = {"queue_s": 0.001, "cached_tokens": 0} if number == 0 else {}
        return TokenOutput(request_id, (number,), finish_reason="length" if is_last else None, **facts)

    def _release_unused(self) -> None:
        users = {self._submits[request_id].request.adapter for request_id in self._given}
        for release in [release for release in self._releasing if release.digest not in users]:
            state = self._states.pop(release.digest, None)
            self._done.append(Done(release.ticket, freed_bytes=state.num_bytes if state else 0))
            self._releasing.remove(release)
