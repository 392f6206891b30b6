"""Runs a plan: in this process, or in several so that the client is not the limit."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from .answer import Answer
from .plan import LoadPlan
from .result import LoadResult, RequestRecord
from .stream import StreamClient

T = TypeVar("T")

_REPORT_EVERY_S = 0.25
# Until every process stands ready and the first request is due.
_HEAD_START_S = 0.05
_START_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Progress:
    """How far a run is: requests that ended, with errors among them, tokens that came, and requests under way."""

    ended: int = 0
    errors: int = 0
    output_tokens: int = 0
    running: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(
            self.ended + other.ended,
            self.errors + other.errors,
            self.output_tokens + other.output_tokens,
            self.running + other.running,
        )


OnProgress = Callable[[Progress], None]


def run_load(plan: LoadPlan, on_progress: OnProgress = lambda progress: None) -> LoadResult:
    """Send all requests of the plan, after its warm-up, and gather what came back."""
    if plan.concurrency is not None:
        # A process without a stream would send nothing of its share.
        plan = replace(plan, processes=min(plan.processes, plan.concurrency))
    if plan.processes == 1:
        worker = _Worker(plan, 0, on_progress)
        return run_fast(worker.run_alone())
    return _run_processes(plan, on_progress)


def run_fast(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run``, on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


class _Worker:
    """The requests of one process: every ``plan.processes``-th, beginning with ``share``."""

    def __init__(self, plan: LoadPlan, share: int, on_progress: OnProgress) -> None:
        self._plan = plan
        self._share = share
        self._on_progress = on_progress
        path = "/v1/chat/completions" if plan.endpoint == "chat" else "/v1/completions"
        self._client = StreamClient(plan.url, path, plan.api_key, plan.timeout_s)
        self._records: list[RequestRecord] = []
        self._progress = Progress()
        self._running: dict[int, Answer] = {}

    async def run_alone(self) -> LoadResult:
        await self.warm_up()
        start_s = time.monotonic() + _HEAD_START_S
        return LoadResult(start_s, await self.run(start_s))

    async def warm_up(self) -> None:
        """This process's part of the warm-up; what fails here will fail again where it counts."""
        indices = range(-1 - self._share, -1 - self._plan.warmup, -self._plan.processes)
        places = asyncio.Semaphore(_share_of(self._plan.concurrency or 32, self._plan.processes, self._share) or 1)

        async def send(index: int) -> None:
            async with places:
                await self._client.post(self._plan.request(index).body, Answer())

        await asyncio.gather(*(send(index) for index in indices))

    async def run(self, start_s: float) -> list[RequestRecord]:
        """All requests, from ``start_s`` on the monotonic clock."""
        reporting = asyncio.create_task(self._report())
        try:
            if self._plan.rate is None:
                await self._run_closed(start_s)
            else:
                await self._run_open(start_s)
        finally:
            reporting.cancel()
            await self._client.close()
        self._on_progress(self._progress)
        return self._records

    async def _run_closed(self, start_s: float) -> None:
        plan = self._plan
        indices = iter(range(self._share, plan.num_requests or 1 << 60, plan.processes))
        await _sleep_until(start_s)
        streams = _share_of(plan.concurrency or 1, plan.processes, self._share)
        await asyncio.gather(*(self._stream(indices, start_s) for _ in range(streams)))

    async def _stream(self, indices: Iterator[int], start_s: float) -> None:
        deadline = start_s + (self._plan.duration_s or float("inf"))
        while (now := time.monotonic()) < deadline and (index := next(indices, None)) is not None:
            await self._send(index, now)

    async def _run_open(self, start_s: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for index, at_s in self._plan.arrivals():
                if index % self._plan.processes == self._share:
                    await _sleep_until(start_s + at_s)
                    tasks.create_task(self._send(index, start_s + at_s))

    async def _send(self, index: int, due_s: float) -> None:
        request = self._plan.request(index)
        answer = Answer()
        self._running[index] = answer
        sent_s = time.monotonic()
        await self._client.post(request.body, answer)
        del self._running[index]
        record = RequestRecord(
            index=index,
            model=request.model,
            # A stream sends when it is free: making the request is the client's time, not the server's.
            due_s=due_s if self._plan.rate is not None else sent_s,
            sent_s=sent_s,
            event_s=answer.event_s,
            end_s=time.monotonic(),
            prompt_tokens=answer.prompt_tokens,
            # Servers that say nothing of usage send a token in each event.
            output_tokens=answer.output_tokens or len(answer.event_s),
            error=answer.error,
        )
        self._records.append(record)
        self._progress += Progress(1, not record.ok, record.output_tokens)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            events = sum(len(answer.event_s) for answer in self._running.values())
            self._on_progress(self._progress + Progress(0, 0, events, len(self._running)))


async def _sleep_until(at_s: float) -> None:
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))


def _share_of(total: int, parts: int, index: int) -> int:
    return total // parts + (index < total % parts)


# --- several processes --------------------------------------------------------------------------------------------------


def _run_processes(plan: LoadPlan, on_progress: OnProgress) -> LoadResult:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for share in range(plan.processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(plan, share, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            if not pipe.poll(_START_TIMEOUT_S):
                raise TimeoutError("a process of the load generator did not start")
            pipe.recv()
        start_s = time.monotonic() + _HEAD_START_S
        for pipe in pipes:
            pipe.send(start_s)
        return LoadResult(start_s, _gather(pipes, on_progress))
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _gather(pipes: list[Connection], on_progress: OnProgress) -> list[RequestRecord]:
    """Everybody's records; progress on the way."""
    progress = {id(pipe): Progress() for pipe in pipes}
    waiting, records = list(pipes), list[RequestRecord]()
    while waiting:
        for pipe in wait(waiting):
            assert isinstance(pipe, Connection)
            said = pipe.recv()
            if isinstance(said, Progress):
                progress[id(pipe)] = said
                on_progress(sum(progress.values(), Progress()))
            else:
                records += said
                waiting.remove(pipe)
    return sorted(records, key=lambda record: record.index)


def _work(plan: LoadPlan, share: int, pipe: Connection) -> None:
    """One process: warm up, say so, run when told, hand over the records."""
    run_fast(_work_async(plan, share, pipe))


async def _work_async(plan: LoadPlan, share: int, pipe: Connection) -> None:
    worker = _Worker(plan, share, pipe.send)
    await worker.warm_up()
    pipe.send("ready")
    start_s = await asyncio.to_thread(pipe.recv)
    pipe.send(await worker.run(start_s))
