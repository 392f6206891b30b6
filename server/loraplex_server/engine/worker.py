"""The only bridge between the event loop and the engine.

Commands go to the engine's thread through one queue; each step comes back as one report, whatever the number of
sequences. Everything that crosses is a small frozen value (``engine.messages``).
"""

import asyncio
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.messages import (
    Abort,
    Command,
    Done,
    EngineStats,
    Failure,
    Pin,
    Release,
    StepReport,
    Submit,
    TokenOutput,
    Warm,
)
from loraplex_server.engine.sequence import Request

# While requests wait for something other than the device (a copy, fairness), the engine looks again this often.
_IDLE_POLL_S = 0.02


class QueueFull(Exception):
    """The server has as much waiting as it may. ``retry_after_s`` estimates when a place is free."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(Exception):
    """The engine takes no more requests: it is starting, draining, or it died."""


class EngineCallFailed(Exception):
    """A call such as a warm-up failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class TokenStream:
    """The outputs of one request, as an async iterator that ends after the one with a finish reason.

    Leaving it early (``abort``, or the end of an ``async with``) gives the request's place back.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._outputs: deque[TokenOutput] = deque()
        self._ready = asyncio.Event()
        self._finished = False

    def put(self, output: TokenOutput) -> None:
        self._outputs.append(output)
        self._ready.set()

    def abort(self) -> None:
        """Stop the request if it still runs. May be called any number of times."""
        if not self._finished:
            self._finished = True
            self._abort(self.request_id)

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._finished:
            raise StopAsyncIteration
        while not self._outputs:
            self._ready.clear()
            await self._ready.wait()
        output = self._outputs.popleft()
        self._finished = output.finish_reason is not None
        return output

    async def __aenter__(self) -> "TokenStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class Worker:
    """Runs an engine on a thread of its own, for one event loop.

    ``build`` makes the engine on that thread (it gets a function that wakes the loop when a copy lands);
    ``on_report`` is called on the event loop with every step's report.
    ``max_waiting`` requests, and ``max_waiting_tokens`` prompt tokens, may wait for their first token.
    """

    def __init__(
        self,
        build: Callable[[Callable[[], None]], Engine],
        *,
        max_model_len: int,
        max_waiting: int,
        max_waiting_tokens: int,
        on_report: Callable[[StepReport], None] = lambda report: None,
    ) -> None:
        self.model_len = max_model_len
        self.stats = EngineStats()
        self.death: BaseException | None = None
        """What ended the engine's thread, if nobody had asked it to end."""
        self._build = build
        self._on_report = on_report
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._accepting = False
        self._alive = False
        self._streams: dict[str, TokenStream] = {}
        self._waiting_tokens: dict[str, int] = {}
        self._num_waiting_tokens = 0
        self._calls: dict[int, asyncio.Future[Done]] = {}
        self._tickets = itertools.count()
        self._finish_times: deque[float] = deque(maxlen=64)
        self._all_done = asyncio.Event()
        self._all_done.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """True while new requests are taken."""
        return self._accepting and self._alive

    @property
    def alive(self) -> bool:
        """True while the engine's thread runs, draining included."""
        return self._alive

    async def start(self) -> None:
        """Build the engine and start stepping. Raises what building raised."""
        loop = self._loop = asyncio.get_running_loop()
        built: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._serve, args=(built,), name="engine", daemon=True)
        self._thread.start()
        await built
        self._alive = self._accepting = True

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that run; True if all ended in time."""
        self._accepting = False
        try:
            await asyncio.wait_for(self._all_done.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stop now. Requests that still run end with a ``shutting_down`` failure."""
        self._accepting = False
        self._stop.set()
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> TokenStream:
        """Queue a request. Raises QueueFull and EngineStopped, at once."""
        self.check_room(len(request.prompt_ids))
        num_tokens = len(request.prompt_ids)
        stream = TokenStream(request.id, self._abort)
        self._streams[request.id] = stream
        self._waiting_tokens[request.id] = num_tokens
        self._num_waiting_tokens += num_tokens
        self._all_done.clear()
        self._inbox.put(Submit(request))
        return stream

    def check_room(self, num_tokens: int = 0) -> None:
        """Whether a prompt of this length would be taken now; asked before it is rendered, so that saying no is cheap.

        Raises QueueFull and EngineStopped.
        """
        if not self.running:
            raise EngineStopped("the engine is not running" if not self._alive else "the server is shutting down")
        crowded = len(self._waiting_tokens) >= self._max_waiting
        # A prompt larger than the whole allowance may still wait alone.
        heavy = self._waiting_tokens and self._num_waiting_tokens + num_tokens > self._max_waiting_tokens
        if crowded or heavy:
            what = f"{len(self._waiting_tokens)} requests with {self._num_waiting_tokens} prompt tokens wait already"
            raise QueueFull(f"the server is busy: {what}", self._retry_after_s())

    async def warm(self, digest: str) -> None:
        """Bring an adapter to the device. Raises EngineCallFailed, EngineStopped."""
        await self._call(lambda ticket: Warm(ticket, digest))

    async def release(self, digest: str) -> int:
        """Free every tier of an adapter once nobody uses it; the bytes given back. Raises EngineStopped."""
        return (await self._call(lambda ticket: Release(ticket, digest))).freed_bytes

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep an adapter on the device once it is there, or let it go again."""
        self._inbox.put(Pin(digest, pinned))

    async def _call(self, command: Callable[[int], Command]) -> Done:
        if not self._alive:
            raise EngineStopped("the engine is not running")
        ticket = next(self._tickets)
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._calls[ticket] = future
        self._inbox.put(command(ticket))
        try:
            done = await future
        finally:
            self._calls.pop(ticket, None)
        if done.failure is not None:
            raise EngineCallFailed(done.failure)
        return done

    def _abort(self, request_id: str) -> None:
        if self._close_stream(request_id):
            self._inbox.put(Abort(request_id))

    def _retry_after_s(self) -> float:
        times = self._finish_times
        if len(times) < 2 or times[-1] <= times[0]:
            return 1.0
        per_request = (times[-1] - times[0]) / (len(times) - 1)
        return min(max(per_request * len(self._waiting_tokens) / 2, 1.0), 60.0)

    # --- reports, on the event loop ---------------------------------------------------------------------------------

    def _deliver(self, report: StepReport) -> None:
        if report.stats is not None:
            self.stats = report.stats
        for output in report.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # aborted while this output was on its way
                continue
            self._started(output.request_id)
            stream.put(output)
            if output.finish_reason is not None:
                self._finish_times.append(time.monotonic())
                self._close_stream(output.request_id)
        for done in report.done:
            future = self._calls.get(done.ticket)
            if future is not None and not future.done():
                future.set_result(done)
        self._on_report(report)

    def _started(self, request_id: str) -> None:
        self._num_waiting_tokens -= self._waiting_tokens.pop(request_id, 0)

    def _close_stream(self, request_id: str) -> bool:
        self._started(request_id)
        known = self._streams.pop(request_id, None) is not None
        if not self._streams:
            self._all_done.set()
        return known

    def _died(self, error: BaseException | None) -> None:
        """The thread ended: nobody may wait for it any longer."""
        self._alive = self._accepting = False
        self.death = error
        code, message = ("shutting_down", "the server is shutting down")
        if error is not None:
            code, message = ("engine_error", f"the engine stopped: {type(error).__name__}: {error}")
        failure = Failure("engine_error" if code == "engine_error" else "shutting_down", message)
        for request_id, stream in list(self._streams.items()):
            stream.put(TokenOutput(request_id, (), finish_reason="error", failure=failure))
            self._close_stream(request_id)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineStopped(message))

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _serve(self, built: asyncio.Future[None]) -> None:
        assert self._loop is not None
        call = self._loop.call_soon_threadsafe
        try:
            engine = self._build(lambda: self._inbox.put(None))
        except BaseException as error:  # start() raises it on the event loop
            call(built.set_exception, error)
            return
        call(built.set_result, None)
        problem: BaseException | None = None
        try:
            while not self._stop.is_set():
                self._take_commands(engine)
                report = engine.step()
                if report.outputs or report.done or report.loads or report.step_s or report.stats:
                    call(self._deliver, report)
            engine.close()
            call(self._deliver, engine.step())
        except BaseException as error:
            problem = error
        if not self._loop.is_closed():
            call(self._died, problem)

    def _take_commands(self, engine: Engine) -> None:
        """Hand over what has come in; sleep when there is nothing to do."""
        if not engine.has_work:
            timeout = _IDLE_POLL_S if engine.is_waiting else None
            try:
                command = self._inbox.get(timeout=timeout)
            except queue.Empty:
                return
            if command is not None:
                engine.handle(command)
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                engine.handle(command)
