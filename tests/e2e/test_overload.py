"""A flood is answered fast: some requests run, some wait, the rest is told when to come back; and then all is as before."""

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.serving import ANSWERS, ServerProcess, chat_body, events, long_body

pytestmark = pytest.mark.e2e

MAX_RUNNING, MAX_WAITING = 4, 8
REFUSED_WITHIN_S = 0.1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with few places."""
    folder = tmp_path_factory.mktemp("small")
    flags = ("--max-running", str(MAX_RUNNING), "--max-waiting", str(MAX_WAITING), "--max-waiting-tokens", "4000")
    server = ServerProcess(folder / "data", *flags)
    yield server
    server.kill()


@pytest.mark.anyio
async def test_a_burst_of_ten_times_the_places_is_refused_at_once(small: ServerProcess) -> None:
    burst = 10 * (MAX_RUNNING + MAX_WAITING)
    models = list(ANSWERS)
    async with small.async_client() as user:
        # Open connections first: the promise is about answers, not about this client's own set-up.
        await asyncio.gather(*(user.get("/health") for _ in range(burst)))
        holding = [
            asyncio.create_task(user.post("/v1/chat/completions", json=long_body(num_tokens=250)))
            for _ in range(MAX_RUNNING + MAX_WAITING)
        ]
        await asyncio.to_thread(small.until, "vllm:num_requests_waiting", MAX_WAITING)

        async def ask(number: int) -> tuple[int, float, httpx.Response]:
            begun = time.perf_counter()
            answer = await user.post("/v1/chat/completions", json=chat_body(models[number % 4]))
            return answer.status_code, time.perf_counter() - begun, answer

        found = [await ask(number) for number in range(20)]
        for status, _, answer in found:
            assert status == 429, answer.text
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        took = sorted(took_s for _, took_s, _ in found)
        assert took[len(took) // 2] < REFUSED_WITHIN_S, took
        crowd = await asyncio.gather(*(ask(number) for number in range(burst)))
        statuses = Counter(status for status, _, _ in crowd)
        assert statuses[429] >= burst / 2
        assert set(statuses) <= {200, 429}
        answers = await asyncio.gather(*holding)
        assert {answer.status_code for answer in answers} <= {200, 429}
        assert sum(answer.status_code == 200 for answer in answers) >= MAX_RUNNING
    refused_ms = sorted(line["ms"] for line in small.log() if line.get("status") == 429)
    assert len(refused_ms) >= 20 + burst / 2
    assert refused_ms[int(len(refused_ms) * 0.9)] < REFUSED_WITHIN_S * 1000
    assert refused_ms[-1] < 10 * REFUSED_WITHIN_S * 1000
    small.until("vllm:num_requests_running", 0)
    small.until("vllm:num_requests_waiting", 0)
    assert small.answer("shout") == ANSWERS["shout"]


@pytest.mark.anyio
async def test_queued_prompt_tokens_are_bounded_too(small: ServerProcess) -> None:
    async with small.async_client() as user:
        holding = [
            asyncio.create_task(user.post("/v1/chat/completions", json=long_body(num_tokens=200)))
            for _ in range(MAX_RUNNING)
        ]
        await asyncio.to_thread(small.until, "vllm:num_requests_running", MAX_RUNNING)
        heavy = "Tell me about France. " * 250
        crowd = await asyncio.gather(
            *(user.post("/v1/chat/completions", json=chat_body(content=heavy, max_tokens=1)) for _ in range(6))
        )
        statuses = Counter(answer.status_code for answer in crowd)
        assert statuses[429] >= 2
        assert statuses[200] >= 1
        await asyncio.gather(*holding)


@pytest.mark.anyio
async def test_a_flood_for_one_adapter_does_not_starve_another(small: ServerProcess) -> None:
    async with small.async_client() as user:
        flood = [
            asyncio.create_task(user.post("/v1/chat/completions", json=long_body("shout", 200, seed=i)))
            for i in range(MAX_RUNNING + MAX_WAITING - 2)
        ]
        await asyncio.to_thread(small.until, "vllm:num_requests_running", MAX_RUNNING)
        alone = await user.post("/v1/chat/completions", json=chat_body("pirate"))
        assert alone.json()["choices"][0]["message"]["content"] == ANSWERS["pirate"]
        assert not all(task.done() for task in flood)
        await asyncio.gather(*flood)


def test_a_second_signal_stops_at_once(small: ServerProcess) -> None:
    cut: list[str] = []

    def stream() -> None:
        try:
            with small.user.stream(
                "POST", "/v1/chat/completions", json=long_body("shout", 1900, stream=True)
            ) as answer:
                events(list(answer.iter_lines()))
        except (httpx.RemoteProtocolError, httpx.ReadError, AssertionError) as error:
            cut.append(type(error).__name__)

    streaming = threading.Thread(target=stream)
    streaming.start()
    small.until("vllm:num_requests_running", 1)
    small.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert small.process.poll() is None, "the first signal drains"
    begun = time.monotonic()
    small.signal(signal.SIGTERM)
    small.wait(15)
    assert time.monotonic() - begun < 10
    streaming.join(timeout=10)
    assert cut
