"""Where an engine runs, a thread or a process of its own, and what is the same in both: how it comes to be and its loop."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.messages import Command, StepReport
from loraplex_server.traces import where_of

# While requests wait for something other than the device (a copy, fairness), the engine looks again this often.
_IDLE_POLL_S = 0.02

Progress = Callable[[int, int], None]
"""Bytes of the base read so far, and in all."""


class StepEngine(Protocol):
    """What a host runs: ``engine.Engine``, or something that behaves like it."""

    @property
    def has_work(self) -> bool: ...

    @property
    def is_waiting(self) -> bool: ...

    def handle(self, command: Command) -> None: ...

    def step(self) -> StepReport: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the rest of the server must know of an engine: its base, and the longest sequence it takes."""

    base: BaseShape
    max_model_len: int


class LoadedBase(Protocol):
    """A base in memory that an engine can be built on."""

    @property
    def facts(self) -> EngineFacts: ...

    def build(self, wake: Callable[[], None]) -> StepEngine:
        """The engine. ``wake`` may be called from any thread to end its loop's sleep, as when a copy lands."""


class EngineRecipe(Protocol):
    """How an engine comes to be. Everything runs where the engine will; for a process the recipe is pickled."""

    def enter_process(self) -> None:
        """Called first in a process of the engine's own: set up what the server's process has already."""

    def load(self, progress: Progress | None) -> LoadedBase:
        """Bring the base into memory. What this raises reaches whoever starts the server."""


@dataclass(frozen=True, slots=True)
class EngineDeath:
    """What ended an engine that nobody had asked to end. ``at``: the last places in the code, innermost last."""

    kind: str
    message: str
    at: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: BaseException) -> "EngineDeath":
        return cls(type(error).__name__, str(error), tuple(where_of(error)))


class EngineNotStarted(Exception):
    """The engine could not be made; the message says why."""


class EngineHost(Protocol):
    """Runs one engine for one event loop. All calls but ``load`` and ``close`` are made on that loop."""

    def load(self, progress: Progress | None = None) -> EngineFacts:
        """Bring the base into memory; returns when it is there. Raises what loading raised, EngineNotStarted."""

    async def start(
        self, on_report: Callable[[StepReport], None], on_end: Callable[[EngineDeath | None], None]
    ) -> None:
        """Build the engine and start stepping. Raises what building raised, EngineNotStarted.

        From then on ``on_report`` gets every report, and ``on_end`` is called once: with None after ``stop``.
        """

    def send(self, command: Command) -> None:
        """Hand over a command. Returns at once; to an engine that has ended nothing is sent."""

    async def stop(self) -> None:
        """End the engine and wait until it has ended."""

    def close(self) -> None:
        """End what was loaded but not started, at once. May be called at any time, from any thread."""


class EngineLink(Protocol):
    """The engine's end of the road."""

    def take(self, wait_s: float | None) -> Iterable[Command] | None:
        """The commands that have come in; None once the engine is to end.

        Sleeps until there is one, or until it is woken, for at most ``wait_s`` (None: for as long as it takes).
        """

    def give(self, report: StepReport) -> None:
        """Send a report. Never waits for whoever reads it."""


def run_engine(engine: StepEngine, link: EngineLink) -> None:
    """Step until the link says that it is over; then fail what still runs."""
    while (commands := link.take(_sleep_s(engine))) is not None:
        for command in commands:
            engine.handle(command)
        report = engine.step()
        if report.outputs or report.done or report.loads or report.step_s or report.stats:
            link.give(report)
    engine.close()
    link.give(engine.step())


def _sleep_s(engine: StepEngine) -> float | None:
    if engine.has_work:
        return 0.0
    return _IDLE_POLL_S if engine.is_waiting else None
