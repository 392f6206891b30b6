"""An engine on a thread of the server's own process: on a CPU, where the steps' work lets go of the interpreter's lock."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable

from loraplex_server.engine.host import EngineDeath, EngineFacts, EngineRecipe, LoadedBase, Progress, run_engine
from loraplex_server.engine.messages import Command, StepReport


class EngineThread:
    """Runs the engine of ``recipe`` on a thread. See ``host.EngineHost``."""

    def __init__(self, recipe: EngineRecipe) -> None:
        self._recipe = recipe
        self._loaded: LoadedBase | None = None
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended = False

    def load(self, progress: Progress | None = None) -> EngineFacts:
        self._loaded = self._recipe.load(progress)
        return self._loaded.facts

    async def start(
        self, on_report: Callable[[StepReport], None], on_end: Callable[[EngineDeath | None], None]
    ) -> None:
        assert self._loaded is not None, "load comes first"
        loop = asyncio.get_running_loop()
        built: asyncio.Future[None] = loop.create_future()
        life = _Life(loop, built, on_report, on_end)
        self._thread = threading.Thread(target=self._run, args=(self._loaded, life), name="engine", daemon=True)
        self._thread.start()
        await built

    def send(self, command: Command) -> None:
        if not self._ended:
            self._inbox.put(command)

    async def stop(self) -> None:
        self.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def close(self) -> None:
        self._stopping.set()
        self._inbox.put(None)

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self, loaded: LoadedBase, life: "_Life") -> None:
        call = life.loop.call_soon_threadsafe
        try:
            engine = loaded.build(lambda: self._inbox.put(None))
        except BaseException as error:  # start() raises it on the event loop
            call(life.built.set_exception, error)
            return
        call(life.built.set_result, None)
        death: EngineDeath | None = None
        try:
            run_engine(engine, _ThreadLink(self._inbox, self._stopping, lambda report: call(life.on_report, report)))
        except BaseException as error:
            death = EngineDeath.of(error)
        self._ended = True
        if not life.loop.is_closed():
            call(life.on_end, death)


class _Life:
    """Whom the thread reports to."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        built: "asyncio.Future[None]",
        on_report: Callable[[StepReport], None],
        on_end: Callable[[EngineDeath | None], None],
    ) -> None:
        self.loop = loop
        self.built = built
        self.on_report = on_report
        self.on_end = on_end


class _ThreadLink:
    """See ``host.EngineLink``. A None in the queue only wakes."""

    def __init__(
        self,
        inbox: "queue.SimpleQueue[Command | None]",
        stopping: threading.Event,
        give: Callable[[StepReport], object],
    ) -> None:
        self._inbox = inbox
        self._stopping = stopping
        self._give = give

    def take(self, wait_s: float | None) -> Iterable[Command] | None:
        commands: list[Command] = []
        try:
            first = self._inbox.get(timeout=wait_s) if wait_s != 0 else self._inbox.get_nowait()
            while True:
                if first is not None:
                    commands.append(first)
                first = self._inbox.get_nowait()
        except queue.Empty:
            pass
        return None if self._stopping.is_set() else commands

    def give(self, report: StepReport) -> None:
        self._give(report)
