"""The bridge between the event loop and the engine, whether that runs on a thread or in a process."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_server.engine.host import EngineFacts, EngineHost, EngineRecipe
from loraplex_server.engine.messages import Pin
from loraplex_server.engine.process import EngineProcess
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.engine.thread import EngineThread
from loraplex_server.engine.token_stream import TokenStream
from loraplex_server.engine.worker import EngineCallFailed, EngineStopped, QueueFull, Worker
from loraplex_server.model.errors import BadCheckpoint
from loraplex_server.model.loader import load
from tests.engine.hosting import RAISES, CountingRecipe, Given
from tests.engine.support import real_engine
from tests.models import make_adapter, make_checkpoint

pytestmark = pytest.mark.anyio

Host = Callable[[EngineRecipe], EngineHost]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=[EngineThread, EngineProcess], ids=["thread", "process"])
def host(request: pytest.FixtureRequest) -> Host:
    kind: Host = request.param
    return kind


@asynccontextmanager
async def running(
    host: EngineHost, *, max_waiting: int = 100, max_waiting_tokens: int = 10_000, **more: Any
) -> AsyncIterator[Worker]:
    facts = host.load()
    worker = Worker(
        host,
        max_model_len=facts.max_model_len,
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
        **more,
    )
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


def request(
    name: str, *, max_tokens: int = 4, adapter: str | None = None, num_prompt: int = 5, first_id: int = 0
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(name, (first_id, *range(1, num_prompt)), params, adapter)


async def tokens(stream: TokenStream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


async def idle(worker: Worker) -> None:
    deadline = time.monotonic() + 10
    while worker.stats.num_running or worker.stats.num_waiting:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_streams_end_with_a_reason_and_hold_every_token(host: Host) -> None:
    async with running(host(CountingRecipe())) as worker:
        streams = [worker.submit(request(f"r{i}", max_tokens=i + 1)) for i in range(6)]
        outputs = [[output async for output in stream] for stream in streams]
        assert [[token for output in found for token in output.token_ids] for found in outputs] == [
            list(range(i + 1)) for i in range(6)
        ]
        assert all(found[-1].finish_reason == "length" for found in outputs)
        assert all(found[0].queue_s == 0.001 for found in outputs)


async def test_a_listener_hears_of_every_arrival_and_takes_what_is_there(host: Host) -> None:
    async with running(host(CountingRecipe())) as worker:
        stream, heard, everything = worker.submit(request("r", max_tokens=50)), asyncio.Event(), []
        stream.listen(heard.set)
        while len(everything) < 50:
            await asyncio.wait_for(heard.wait(), 10)
            heard.clear()
            everything += [arrival if isinstance(arrival, int) else arrival.token_ids[0] for arrival in stream.take()]
        assert everything == list(range(50))
        assert stream.take() == []


async def test_a_request_that_leaves_frees_its_place(host: Host) -> None:
    async with running(host(CountingRecipe(step_s=0.001))) as worker:
        async with worker.submit(request("long", max_tokens=100_000)) as stream:
            await anext(stream)
        await idle(worker)
        stream.abort()  # once more changes nothing
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_full_queue_is_said_at_once_with_a_time_to_come_back(host: Host) -> None:
    async with running(host(CountingRecipe()), max_waiting=2) as worker:
        streams = [worker.submit(request(f"r{i}", max_tokens=100)) for i in range(2)]
        started = time.monotonic()
        with pytest.raises(QueueFull) as caught:
            worker.submit(request("more"))
        with pytest.raises(QueueFull):
            worker.reserve()
        assert time.monotonic() - started < 0.1
        assert caught.value.retry_after_s >= 1
        for stream in streams:
            stream.abort()
        assert len(await tokens(worker.submit(request("later")))) == 4


async def test_a_reserved_place_counts_until_it_is_given_back(host: Host) -> None:
    async with running(host(CountingRecipe()), max_waiting=2) as worker:
        places = [worker.reserve(), worker.reserve()]
        with pytest.raises(QueueFull, match="2 requests"):
            worker.reserve()
        places[0].release()
        places[0].release()  # once more changes nothing
        stream = worker.submit(request("in its place"))
        with pytest.raises(QueueFull):
            worker.submit(request("next"))
        with pytest.raises(ValueError, match="while rendering"), places[1]:
            raise ValueError("while rendering")
        assert len(await tokens(stream)) == 4
        with worker.reserve() as kept, worker.reserve():
            assert kept is not None


async def test_queued_prompt_tokens_are_bounded(host: Host) -> None:
    async with running(host(CountingRecipe()), max_waiting_tokens=50) as worker:
        streams = [worker.submit(request("large", num_prompt=90))]  # alone, more than the allowance may wait
        with pytest.raises(QueueFull, match="90 prompt tokens"):
            worker.submit(request("next"))
        await asyncio.gather(*map(tokens, streams))
        await tokens(worker.submit(request("after")))


async def test_a_broken_adapter_fails_its_requests_alone(host: Host) -> None:
    async with running(host(CountingRecipe())) as worker:
        good, bad = worker.submit(request("good")), worker.submit(request("bad", adapter="broken"))
        outputs = [output async for output in bad]
        assert outputs[-1].failure is not None
        assert outputs[-1].failure.code == "adapter_load_failed"
        assert len(await tokens(good)) == 4
        with pytest.raises(EngineCallFailed):
            await worker.warm("broken")


async def test_warm_pin_and_release_reach_the_engine_and_are_answered(host: Host) -> None:
    reports: list[Any] = []
    async with running(host(CountingRecipe()), on_report=reports.append) as worker:
        await worker.warm("a")
        assert worker.stats.adapters["a"].residency == "gpu"
        assert [load.digest for report in reports for load in report.loads] == ["a"]
        worker.pin("b", True)
        await worker.warm("c")
        assert worker.stats.adapters["b"].pinned
        assert await worker.release("a") == 100
        await worker.forget_prefixes()
        assert set(worker.stats.adapters) == {"b", "c"}


async def test_release_waits_for_the_last_user(host: Host) -> None:
    async with running(host(CountingRecipe(step_s=0.001))) as worker:
        await worker.warm("a")
        stream = worker.submit(request("user", adapter="a", max_tokens=150))
        await anext(stream)
        releasing = asyncio.create_task(worker.release("a"))
        assert len(await tokens(stream)) == 149
        assert await asyncio.wait_for(releasing, 10) > 0


async def test_what_a_fresh_engine_is_told_comes_first(host: Host) -> None:
    async with running(host(CountingRecipe()), first=[Pin("a", True)]) as worker:
        await tokens(worker.submit(request("r")))
        assert worker.stats.adapters["a"].pinned


async def test_draining_finishes_what_runs_and_takes_nothing_new(host: Host) -> None:
    async with running(host(CountingRecipe(step_s=0.001))) as worker:
        stream = worker.submit(request("last", max_tokens=50))
        draining = asyncio.create_task(worker.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped):
            worker.submit(request("late"))
        assert len(await tokens(stream)) == 50
        assert await draining
    assert not worker.alive
    assert worker.death is None


async def test_stopping_ends_every_stream_with_a_reason_and_closes_the_engine(host: Host, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    async with running(host(CountingRecipe(step_s=0.001, says_when_closed=str(closed)))) as worker:
        stream = worker.submit(request("cut", max_tokens=100_000))
        await anext(stream)
        await worker.stop()
        last = [output async for output in stream][-1]
        assert last.failure is not None
        assert last.failure.code == "shutting_down"
        with pytest.raises(EngineStopped):
            await worker.warm("a")
    assert closed.read_text() == "closed"


async def test_what_loading_raises_reaches_whoever_starts(host: Host) -> None:
    made = host(CountingRecipe(load_error=BadCheckpoint("two tensors of one name")))
    with pytest.raises(BadCheckpoint, match="two tensors of one name"):
        made.load()
    made.close()


async def test_what_building_raises_start_raises(host: Host) -> None:
    made = host(CountingRecipe(build_error=MemoryError("no room")))
    facts = made.load()
    worker = Worker(made, max_model_len=facts.max_model_len, max_waiting=1, max_waiting_tokens=1)
    with pytest.raises(MemoryError, match="no room"):
        await worker.start()
    assert isinstance(worker.start_error, MemoryError)
    assert not worker.running
    await worker.stop()
    assert worker.death is None


async def test_an_engine_that_raises_is_noticed_by_everybody(host: Host) -> None:
    async with running(host(CountingRecipe(step_s=0.001))) as worker:
        stream = worker.submit(request("victim", max_tokens=100_000))
        await anext(stream)
        worker.submit(request("culprit", first_id=RAISES))
        last = [output async for output in stream][-1]
        assert last.failure is not None
        assert "ZeroDivisionError" in last.failure.message
        assert not worker.alive
        assert worker.death is not None
        assert worker.death.kind == "ZeroDivisionError"
        assert any("hosting.py" in place for place in worker.death.at)
        with pytest.raises(EngineStopped):
            worker.submit(request("next"))


async def test_a_real_engine_on_a_thread_serves_any_mix(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base")
    adapters = {"a": make_adapter(tmp_path / "a", checkpoint), "broken": tmp_path / "nowhere"}
    decoder = load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
    recipe = Given(lambda wake: real_engine(decoder, adapters), EngineFacts(decoder.base_shape, 256))
    async with running(EngineThread(recipe)) as worker:
        streams = [worker.submit(request(f"r{i}", adapter="a" if i % 2 else None)) for i in range(6)]
        found = await asyncio.gather(*map(tokens, streams))
        assert [len(answer) for answer in found] == [4] * 6, worker.death
        assert found[0] == found[2] == found[4]
        assert found[1] == found[3] == found[5]
        assert await worker.release("a") > 0
        assert "a" not in worker.stats.adapters
        with pytest.raises(EngineCallFailed):
            await worker.warm("broken")
        async with worker.submit(request("long", max_tokens=200)) as stream:
            await anext(stream)
        await idle(worker)
        assert worker.stats.kv_blocks_used == 0
