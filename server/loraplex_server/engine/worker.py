"""The event loop's side of the bridge to the engine: who may come in, whose tokens are whose, and what became of calls.

Commands go to the engine's host; each step comes back as one report, whatever the number of sequences. Everything that
crosses is a small frozen value (``engine.messages``).
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from loraplex_server.engine.host import EngineDeath, EngineHost
from loraplex_server.engine.messages import (
    Abort,
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
from loraplex_server.engine.sequence import Request
from loraplex_server.engine.token_stream import TokenStream


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


class Place:
    """A place in the queue, held for a request that is still being prepared; whoever submits it gives the place back.

    As a context manager it is given back if the block fails.
    """

    __slots__ = ("_give_back",)

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        """Give the place back. May be called any number of times."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.release()


class Worker:
    """Serves one event loop with the engine of ``host``, whose base has been loaded.

    ``on_report`` is called on the event loop with every step's report. ``max_waiting`` requests, and
    ``max_waiting_tokens`` prompt tokens, may wait for their first token. ``first``: commands for a fresh engine.
    """

    def __init__(
        self,
        host: EngineHost,
        *,
        max_model_len: int,
        max_waiting: int,
        max_waiting_tokens: int,
        on_report: Callable[[StepReport], None] = lambda report: None,
        first: Sequence[Command] = (),
    ) -> None:
        self.model_len = max_model_len
        self.stats = EngineStats()
        self.death: EngineDeath | None = None
        """What ended the engine, if nobody had asked it to end."""
        self.start_error: BaseException | None = None
        """What ``start`` raised."""
        self._host = host
        self._on_report = on_report
        self._first = first
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._accepting = False
        self._alive = False
        self._streams: dict[str, TokenStream] = {}
        self._num_places = 0
        self._waiting_tokens: dict[str, int] = {}
        self._num_waiting_tokens = 0
        self._calls: dict[int, asyncio.Future[Done]] = {}
        self._tickets = itertools.count()
        self._finish_times: deque[float] = deque(maxlen=64)
        self._all_done = asyncio.Event()
        self._all_done.set()

    # --- life -------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """True while new requests are taken."""
        return self._accepting and self._alive

    @property
    def alive(self) -> bool:
        """True while the engine runs, draining included."""
        return self._alive

    async def start(self) -> None:
        """Build the engine and start stepping. Raises what building raised, EngineNotStarted."""
        try:
            await self._host.start(self._deliver, self._end)
        except BaseException as error:
            self.start_error = error
            raise
        self._alive = self._accepting = True
        for command in self._first:
            self._host.send(command)

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
        await self._host.stop()

    # --- requests ---------------------------------------------------------------------------------------------------

    def reserve(self) -> Place:
        """A place for a request whose prompt is not known yet, so that saying no is cheap.

        It counts as waiting until it is released. Raises QueueFull and EngineStopped.
        """
        self._check_room(0)
        self._num_places += 1
        return Place(self._free_place)

    def submit(self, request: Request) -> TokenStream:
        """Queue a request. Raises QueueFull and EngineStopped, at once."""
        num_tokens = len(request.prompt_ids)
        self._check_room(num_tokens)
        stream = TokenStream(request.id, self._abort)
        self._streams[request.id] = stream
        self._waiting_tokens[request.id] = num_tokens
        self._num_waiting_tokens += num_tokens
        self._all_done.clear()
        self._host.send(Submit(request))
        return stream

    async def warm(self, digest: str) -> None:
        """Bring an adapter to the device. Raises EngineCallFailed, EngineStopped."""
        await self._call(lambda ticket: Warm(ticket, digest))

    async def release(self, digest: str) -> int:
        """Free every tier of an adapter once nobody uses it; the bytes given back. Raises EngineStopped."""
        return (await self._call(lambda ticket: Release(ticket, digest))).freed_bytes

    async def forget_prefixes(self) -> None:
        """Empty the prefix cache. Raises EngineStopped."""
        await self._call(ForgetPrefixes)

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep an adapter on the device once it is there, or let it go again."""
        self._host.send(Pin(digest, pinned))

    def _check_room(self, num_tokens: int) -> None:
        if not self.running:
            raise EngineStopped("the engine is not running" if not self._alive else "the server is shutting down")
        num_waiting = len(self._waiting_tokens) + self._num_places
        # A prompt larger than the whole allowance may still wait alone.
        heavy = self._waiting_tokens and self._num_waiting_tokens + num_tokens > self._max_waiting_tokens
        if num_waiting >= self._max_waiting or heavy:
            what = f"{num_waiting} requests with {self._num_waiting_tokens} prompt tokens wait already"
            raise QueueFull(f"the server is busy: {what}", self._retry_after_s())

    def _free_place(self) -> None:
        self._num_places -= 1

    async def _call(self, command: Callable[[int], Command]) -> Done:
        if not self._alive:
            raise EngineStopped("the engine is not running")
        ticket = next(self._tickets)
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._calls[ticket] = future
        self._host.send(command(ticket))
        try:
            done = await future
        finally:
            self._calls.pop(ticket, None)
        if done.failure is not None:
            raise EngineCallFailed(done.failure)
        return done

    def _abort(self, request_id: str) -> None:
        if self._close_stream(request_id):
            self._host.send(Abort(request_id))

    def _retry_after_s(self) -> float:
        times = self._finish_times
        if len(times) < 2 or times[-1] <= times[0]:
            return 1.0
        per_request = (times[-1] - times[0]) / (len(times) - 1)
        return min(max(per_request * len(self._waiting_tokens) / 2, 1.0), 60.0)

    # --- what the engine says ---------------------------------------------------------------------------------------

    def _deliver(self, report: StepReport) -> None:
        streams = self._streams
        for request_id, token_id in zip(report.plain_ids, report.plain_tokens, strict=True):
            stream = streams.get(request_id)
            if stream is not None:  # not aborted while this was on its way
                stream.put_token(token_id)
        for output in report.outputs:
            stream = streams.get(output.request_id)
            if stream is not None:
                self._deliver_output(stream, output)
        for done in report.done:
            future = self._calls.get(done.ticket)
            if future is not None and not future.done():
                future.set_result(done)
        if report.stats is not None:
            self.stats = report.stats
        self._on_report(report)

    def _deliver_output(self, stream: TokenStream, output: TokenOutput) -> None:
        self._started(output.request_id)
        if output.finish_reason is not None:
            self._finish_times.append(time.monotonic())
            self._close_stream(output.request_id)
        stream.put(output)

    def _started(self, request_id: str) -> None:
        self._num_waiting_tokens -= self._waiting_tokens.pop(request_id, 0)

    def _close_stream(self, request_id: str) -> bool:
        self._started(request_id)
        known = self._streams.pop(request_id, None) is not None
        if not self._streams:
            self._all_done.set()
        return known

    def _end(self, death: EngineDeath | None) -> None:
        """The engine has ended: nobody may wait for it any longer."""
        self._alive = self._accepting = False
        self.death = death
        failure = Failure("shutting_down", "the server is shutting down")
        if death is not None:
            failure = Failure("engine_error", f"the engine stopped: {death.kind}: {death.message}")
        for request_id, stream in list(self._streams.items()):
            self._close_stream(request_id)
            stream.put(TokenOutput(request_id, (), finish_reason="error", failure=failure))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineStopped(failure.message))
