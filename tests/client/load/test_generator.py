"""The load generator against scripted servers: what is sent, what is counted, and from when."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from loraplex_client.load import Lengths, LoadPlan, LoadSummary, Mix, Progress, Slo, run_load, summarize

from .scripted import Exchange, scripted_server


def plan_for(url: str, **given: Any) -> LoadPlan:
    options: dict[str, Any] = {"num_requests": 8, "prompt_tokens": Lengths("4"), "output_tokens": Lengths("3")}
    if "rate" not in given:
        options["concurrency"] = 2
    return LoadPlan(url, given.pop("models", ("m",)), **(options | given))


def run(plan: LoadPlan, slo: Slo | None = None) -> LoadSummary:
    return summarize(plan, run_load(plan), slo)


async def three_words(exchange: Exchange) -> None:
    await exchange.begin()
    for _ in range(3):
        await exchange.text()
    await exchange.end(output_tokens=3)


def test_a_closed_loop_sends_every_request_once_and_keeps_its_connections() -> None:
    seen: list[Progress] = []
    with scripted_server(three_words) as server:
        plan = plan_for(server.url, api_key="secret")
        summary = summarize(plan, run_load(plan, seen.append))
    assert (summary.num_requests, summary.num_ok, summary.errors) == (8, 8, {})
    assert (summary.output_tokens, summary.prompt_tokens, summary.num_events) == (24, 24, 24)
    assert server.connections == 2
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    assert seen[-1] == Progress(ended=8, output_tokens=24)


def test_progress_counts_what_has_come_of_requests_that_still_run() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.text()
        await exchange.text()
        await asyncio.sleep(0.6)
        await exchange.end(output_tokens=2)

    seen: list[Progress] = []
    with scripted_server(script) as server:
        run_load(plan_for(server.url, num_requests=2), seen.append)
    assert Progress(output_tokens=4, running=2) in seen
    assert seen[-1] == Progress(ended=2, output_tokens=4)


def test_what_is_sent_is_the_same_in_any_number_of_processes() -> None:
    sent = []
    for processes in (1, 2):
        with scripted_server(three_words) as server:
            plan = plan_for(
                server.url,
                processes=processes,
                models=("a", "b"),
                mix=Mix("uniform"),
                prompt_tokens=Lengths("uniform:2:9"),
                output_tokens=Lengths("lognormal:4:0.5"),
            )
            assert run(plan).num_ok == 8
        sent.append(sorted(str(body) for body in server.bodies))
    assert sent[0] == sent[1]


def test_a_process_without_a_stream_takes_no_share() -> None:
    with scripted_server(three_words) as server:
        summary = run(plan_for(server.url, concurrency=1, processes=4, num_requests=3))
    assert summary.num_ok == 3


def test_the_warm_up_is_sent_and_does_not_count() -> None:
    with scripted_server(three_words) as server:
        summary = run(plan_for(server.url, warmup=5))
    assert summary.num_requests == 8
    assert len(server.bodies) == 13


def test_errors_are_counted_by_code_and_have_no_latency() -> None:
    async def script(exchange: Exchange) -> None:
        kind = exchange.body["model"]
        if kind == "full":
            return await exchange.refuse(429, "queue_full")
        if kind == "gone":
            return exchange.hang_up()
        await exchange.begin()
        await exchange.text()
        if kind == "breaks":
            return exchange.hang_up()
        if kind == "fails":
            await exchange.event('{"error": {"message": "no", "code": "engine_error"}}')
        await exchange.end(output_tokens=1)
        return None

    models = ("full", "gone", "breaks", "fails", "good")
    with scripted_server(script) as server:
        plan = plan_for(server.url, models=models, num_requests=10)
        summary = run(plan, Slo(request_ms=60_000))
    assert summary.errors == {"queue_full": 2, "connection_lost": 4, "engine_error": 2}
    assert summary.num_ok == 2
    assert summary.within_slo == pytest.approx(0.2)
    assert summary.by_model["good"].errors == {}
    assert summary.by_model["full"].first_token.p50 is None


def test_nobody_listens() -> None:
    with scripted_server(three_words) as server:
        url = server.url
    summary = run(plan_for(url, num_requests=2))
    assert summary.errors == {"connection_ConnectionRefusedError": 2}


def test_a_request_that_takes_too_long_is_an_error() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.begin()
        await asyncio.sleep(5)

    with scripted_server(script) as server:
        summary = run(plan_for(server.url, num_requests=2, timeout_s=0.1))
    assert summary.errors == {"timeout": 2}


def test_times_are_those_of_the_stream() -> None:
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.10)
        await exchange.begin()
        await exchange.text("")  # as servers announce the role: no text, no token
        await exchange.text()
        for _ in range(2):
            await asyncio.sleep(0.05)
            await exchange.text()
        await exchange.end(output_tokens=5)

    with scripted_server(script) as server:
        summary = run(plan_for(server.url, num_requests=2, concurrency=1))
    assert summary.first_token.p50 == pytest.approx(100, abs=40)
    assert summary.inter_token.p50 == pytest.approx(50, abs=25)
    assert summary.per_token.p50 == pytest.approx(25, abs=15)  # four tokens after the first, in 100 ms
    assert summary.request.p50 == pytest.approx(200, abs=70)


def test_at_a_rate_latency_counts_from_when_the_request_was_due() -> None:
    """A server that stalls once: those who were due meanwhile waited too, though they could not be sent at once."""

    async def script(exchange: Exchange) -> None:
        if exchange.number == 0:
            time.sleep(0.5)  # noqa: ASYNC251 - the whole server stands still
        await three_words(exchange)

    with scripted_server(script) as server:
        plan = plan_for(server.url, rate=50.0, num_requests=25, burstiness=100.0)
        result = run_load(plan)
    due = [record.due_s - result.start_s for record in result.records]
    assert due == pytest.approx([at for _, at in plan.arrivals()], abs=1e-6)
    summary = summarize(plan, result)
    # Evenly spread over the stall, latencies go down from 500 ms to nothing.
    assert summary.request.p50 == pytest.approx(250, abs=100)
    assert summary.num_ok == 25


def test_at_a_rate_requests_do_not_wait_for_each_other() -> None:
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)
        await three_words(exchange)

    with scripted_server(script) as server:
        summary = run(plan_for(server.url, rate=100.0, num_requests=20))
    assert server.connections == 20
    assert summary.request.p99 is not None
    assert summary.request.p99 < 600


def test_a_duration_ends_the_run_and_what_came_later_does_not_count() -> None:
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.15)
        await three_words(exchange)

    with scripted_server(script) as server:
        plan = plan_for(server.url, num_requests=None, duration_s=0.4)
        summary = run(plan)
    assert summary.seconds == pytest.approx(0.4)
    assert summary.num_requests in (4, 6)  # two streams, the third of each begun at 0.3 s
    assert summary.requests_per_s == pytest.approx(4 / 0.4)
    assert summary.output_tokens_per_s == pytest.approx(12 / 0.4)


def test_goodput_keeps_to_every_limit() -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.number % 2:
            await asyncio.sleep(0.2)
        await three_words(exchange)

    with scripted_server(script) as server:
        plan = plan_for(server.url, concurrency=1, num_requests=4)
        summary = run(plan, Slo(first_token_ms=100, per_token_ms=10_000))
    assert summary.within_slo == pytest.approx(0.5)
    assert summary.goodput == pytest.approx(2 / summary.seconds)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_answers_cut_anywhere_are_read(size: int) -> None:
    body = b""
    for text in ('{"choices":[{"text":"a"}]}', '{"choices":[{"text":"b"}],"usage":{"completion_tokens":2}}', "[DONE]"):
        event = f"data: {text}\r\n\r\n".encode()
        body += f"{len(event):x};note=1\r\n".encode() + event + b"\r\n"
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n" + body + b"0\r\ntrailer: x\r\n\r\n"

    async def script(exchange: Exchange) -> None:
        for at in range(0, len(answer), size):
            exchange._writer.write(answer[at : at + size])
            await exchange._writer.drain()
            await asyncio.sleep(0)

    with scripted_server(script) as server:
        summary = run(plan_for(server.url, num_requests=3, endpoint="completions"))
    assert (summary.num_ok, summary.num_events, summary.output_tokens) == (3, 6, 6)
    assert server.connections <= 2
