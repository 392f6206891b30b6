"""An engine's process: it ends with the server, whoever ends first and however, and is never in anybody's way."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loraplex_server.engine.host import EngineNotStarted
from loraplex_server.engine.messages import StepReport, Submit
from loraplex_server.engine.process import EngineProcess
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.engine.worker import EngineStopped, Worker
from tests.engine.hosting import DIES, CountingRecipe, UnsendableRecipe

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def running(recipe: CountingRecipe) -> AsyncIterator[tuple[EngineProcess, Worker]]:
    host = EngineProcess(recipe)
    facts = host.load()
    worker = Worker(host, max_model_len=facts.max_model_len, max_waiting=100, max_waiting_tokens=10_000)
    await worker.start()
    try:
        yield host, worker
    finally:
        await worker.stop()


def request(name: str, *, max_tokens: int = 100_000, first_id: int = 0) -> Request:
    return Request(name, (first_id,), SamplingParams(max_tokens=max_tokens))


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the engine's process lives on"
        time.sleep(0.01)


def test_loading_says_how_far_it_is() -> None:
    host, heard = EngineProcess(CountingRecipe()), []
    host.load(lambda done, total: heard.append((done, total)))
    assert heard[-1] == (2, 2)
    host.close()
    host.close()  # once more changes nothing


def test_a_process_that_dies_while_it_loads_is_said_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineNotStarted, match=r"ended while it loaded: killed by signal 6 \(Aborted\)"):
        EngineProcess(CountingRecipe(load_dies=True)).load()
    assert "Fatal Python error: Aborted" in capfd.readouterr().err


def test_an_error_brings_the_place_it_comes_from() -> None:
    with pytest.raises(LookupError) as caught:
        EngineProcess(CountingRecipe(load_error=LookupError("nothing there"))).load()
    assert "hosting.py" in caught.value.__notes__[0]


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    with pytest.raises(EngineNotStarted, match="Holding: an error with a lambda in it"):
        EngineProcess(UnsendableRecipe()).load()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_killed_engine_fails_its_requests_and_all_later_ones(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(CountingRecipe(step_s=0.001)) as (host, worker):
        stream = worker.submit(request("victim"))
        await anext(stream)
        calling = asyncio.create_task(worker.release("never"))
        await asyncio.sleep(0.01)
        assert host.pid is not None
        os.kill(host.pid, number)
        last = [output async for output in stream][-1]
        assert last.failure is not None
        assert last.failure.code == "engine_error"
        assert f"killed by signal {number.value}" in last.failure.message
        assert not worker.alive
        assert worker.death is not None
        assert worker.death.kind == "EngineProcessEnded"
        with pytest.raises(EngineStopped):
            worker.submit(request("next"))
        worker.pin("a", True)  # to nobody
        await asyncio.gather(calling, return_exceptions=True)


async def test_an_engine_that_aborts_is_noticed(capfd: pytest.CaptureFixture[str]) -> None:
    async with running(CountingRecipe()) as (_, worker):
        stream = worker.submit(request("culprit", first_id=DIES))
        last = [output async for output in stream][-1]
        assert last.failure is not None
        assert "killed by signal 6" in last.failure.message


async def test_signals_that_stop_a_server_do_not_reach_its_engine_first() -> None:
    async with running(CountingRecipe(step_s=0.001)) as (host, worker):
        stream = worker.submit(request("one", max_tokens=50))
        await anext(stream)
        assert host.pid is not None
        os.kill(host.pid, signal.SIGINT)
        os.kill(host.pid, signal.SIGTERM)
        assert os.getpgid(host.pid) != os.getpgid(0)
        assert len([output async for output in stream]) == 49
        assert worker.running


async def test_a_server_that_does_not_read_never_holds_up_a_step() -> None:
    reports: list[StepReport] = []
    host = EngineProcess(CountingRecipe())
    host.load()
    await host.start(reports.append, lambda death: None)
    num_tokens, streams = 20_000, 20
    for number in range(streams):
        host.send(Submit(request(f"r{number}", max_tokens=num_tokens)))
    await asyncio.sleep(0.1)
    # Far more than the socket holds: the loop reads nothing for as long as the engine needs for all of it.
    begun = time.monotonic()
    hold_the_loop_while_it_works(host)
    while sum(len(report.plain_ids) + len(report.outputs) for report in reports) < num_tokens * streams:
        assert time.monotonic() - begun < 60
        await asyncio.sleep(0.01)
    found = [
        token
        for report in reports
        for name, token in zip(report.plain_ids, report.plain_tokens, strict=True)
        if name == "r7"
    ]
    assert found == list(range(1, num_tokens - 1))
    await host.stop()


def hold_the_loop_while_it_works(host: EngineProcess) -> None:
    deadline = time.monotonic() + 20
    while cpu_s(host) < 0.5:
        assert time.monotonic() < deadline, "the engine stands still"
        time.sleep(0.05)


def cpu_s(host: EngineProcess) -> float:
    with open(f"/proc/{host.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


ORPHAN = """
import asyncio, sys, time
from loraplex_server.engine.process import EngineProcess
from tests.engine.hosting import CountingRecipe

async def main():
    host = EngineProcess(CountingRecipe())
    host.load()
    await host.start(lambda report: None, lambda death: None)
    print(host.pid, flush=True)
    time.sleep(60)

asyncio.run(main())
"""


def test_an_engine_ends_with_a_server_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert is_alive(pid)
        server.kill()
        wait_for_end(pid)
