"""The bridge between the event loop and the engine's thread."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.messages import StepReport
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.engine.worker import EngineCallFailed, EngineStopped, QueueFull, TokenStream, Worker
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.engine.support import real_engine
from tests.models import make_adapter, make_checkpoint

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, dict[str, Path]]:
    root = tmp_path_factory.mktemp("worker")
    checkpoint = make_checkpoint(root / "base")
    adapters = {"a": make_adapter(root / "a", checkpoint), "broken": root / "nowhere"}
    return load(checkpoint, device="cpu", dtype=torch.float32, quantization="none"), adapters


@asynccontextmanager
async def running(
    parts: tuple[Decoder, dict[str, Path]], *, max_waiting: int = 100, max_waiting_tokens: int = 10_000, **limits: Any
) -> AsyncIterator[Worker]:
    reports: list[StepReport] = []

    def build(wake: Callable[[], None]) -> Engine:
        return real_engine(*parts, **limits)

    worker = Worker(
        build,
        max_model_len=256,
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
        on_report=reports.append,
    )
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


def request(name: str, *, max_tokens: int = 4, adapter: str | None = None, num_prompt: int = 5) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(name, tuple(range(num_prompt)), params, adapter)


async def tokens(stream: TokenStream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


async def idle(worker: Worker) -> None:
    deadline = time.monotonic() + 10
    while worker.stats.num_running or worker.stats.num_waiting:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_streams_end_with_a_reason_and_hold_every_token(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts) as worker:
        streams = [worker.submit(request(f"r{i}", adapter="a" if i % 2 else None)) for i in range(6)]
        found = await asyncio.gather(*map(tokens, streams))
        assert [len(answer) for answer in found] == [4] * 6
        assert found[0] == found[2]
        assert found[1] == found[3]


async def test_a_request_that_leaves_frees_its_place(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts) as worker:
        async with worker.submit(request("long", max_tokens=200)) as stream:
            await anext(stream)
        await idle(worker)
        assert worker.stats.kv_blocks_used == 0
        stream.abort()  # once more changes nothing


async def test_a_full_queue_is_said_at_once_with_a_time_to_come_back(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts, max_waiting=2, max_running=1) as worker:
        streams = [worker.submit(request(f"r{i}", max_tokens=100)) for i in range(2)]
        started = time.monotonic()
        with pytest.raises(QueueFull) as caught:
            worker.submit(request("more"))
        with pytest.raises(QueueFull):
            worker.check_room()
        assert time.monotonic() - started < 0.1
        assert caught.value.retry_after_s >= 1
        for stream in streams:
            stream.abort()
        assert len(await tokens(worker.submit(request("later")))) == 4


async def test_queued_prompt_tokens_are_bounded(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts, max_waiting_tokens=50, max_running=1) as worker:
        streams = [worker.submit(request("large", num_prompt=90))]  # alone, more than the allowance may wait
        with pytest.raises(QueueFull, match="90 prompt tokens"):
            worker.submit(request("next"))
        await asyncio.gather(*map(tokens, streams))
        await tokens(worker.submit(request("after")))


async def test_a_broken_adapter_fails_its_requests_alone(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts) as worker:
        good, bad = worker.submit(request("good")), worker.submit(request("bad", adapter="broken"))
        outputs = [output async for output in bad]
        assert outputs[-1].failure is not None
        assert outputs[-1].failure.code == "adapter_load_failed"
        assert len(await tokens(good)) == 4
        with pytest.raises(EngineCallFailed):
            await worker.warm("broken")


async def test_warm_and_release_are_answered(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts) as worker:
        await worker.warm("a")
        assert worker.stats.adapters["a"].residency == "gpu"
        assert await worker.release("a") > 0
        assert "a" not in worker.stats.adapters


async def test_release_waits_for_the_last_user(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts) as worker:
        stream = worker.submit(request("user", adapter="a", max_tokens=150))
        await anext(stream)
        releasing = asyncio.create_task(worker.release("a"))
        answer = await tokens(stream)
        assert len(answer) == 149
        assert await asyncio.wait_for(releasing, 10) > 0


async def test_draining_finishes_what_runs_and_takes_nothing_new(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts) as worker:
        stream = worker.submit(request("last", max_tokens=50))
        draining = asyncio.create_task(worker.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped):
            worker.submit(request("late"))
        assert len(await tokens(stream)) == 50
        assert await draining
    assert not worker.alive


async def test_stopping_ends_every_stream_with_a_reason(parts: tuple[Decoder, dict[str, Path]]) -> None:
    async with running(parts) as worker:
        stream = worker.submit(request("cut", max_tokens=200))
        await anext(stream)
        await worker.stop()
        last = [output async for output in stream][-1]
        assert last.failure is not None
        assert last.failure.code == "shutting_down"


async def test_what_building_raises_start_raises() -> None:
    def build(wake: Callable[[], None]) -> Engine:
        raise MemoryError("no room")

    worker = Worker(build, max_model_len=8, max_waiting=1, max_waiting_tokens=1)
    with pytest.raises(MemoryError, match="no room"):
        await worker.start()
    assert not worker.running


async def test_an_engine_that_dies_is_noticed_by_everybody(
    parts: tuple[Decoder, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(parts) as worker:
        stream = worker.submit(request("victim", max_tokens=200))
        await anext(stream)
        monkeypatch.setattr(Engine, "step", lambda self: 1 / 0)
        last = [output async for output in stream][-1]
        assert last.failure is not None
        assert "ZeroDivisionError" in last.failure.message
        assert not worker.alive
        with pytest.raises(EngineStopped):
            worker.submit(request("next"))
