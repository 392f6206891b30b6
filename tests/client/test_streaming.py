"""Streams against mock answers (both clients) and over a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import httpx
import pytest

from loraplex_client import (
    APIConnectionError,
    APIError,
    AsyncLoraplex,
    Loraplex,
    NotFoundError,
    ResponseFormatError,
)

from .drivers import Driver, Script, chat_answer, chat_chunk, error_answer, event_stream, events
from .servers import FakeServer, Handler, Seen


def test_chunks_and_their_texts(driver: Driver) -> None:
    usage = {"id": "chatcmpl-1", "choices": [], "usage": {"completion_tokens": 2}}
    script = Script(event_stream(b": hello\n\n" + events(chat_chunk("Ahoy"), chat_chunk(" there"), usage)))
    chunks = driver.stream(script, "chat", "hello", model="pirate", stream_options={"include_usage": True})
    assert [chunk.text for chunk in chunks] == ["Ahoy", " there", ""]
    assert chunks[-1].usage.completion_tokens == 2
    assert script.json()["stream"] is True
    assert script.requests[0].headers["accept"] == "text/event-stream"


def test_completions_stream(driver: Driver) -> None:
    payload = {"id": "cmpl-1", "choices": [{"index": 1, "text": "other"}, {"index": 0, "text": "this"}]}
    (chunk,) = driver.stream(Script(event_stream(events(payload))), "completions", "x", model="base")
    assert chunk.text == "this"


def test_an_error_event_raises_after_the_chunks_before_it(server: FakeServer) -> None:
    def fail_midway(handler: Handler, _seen: Seen) -> None:
        handler.start_events()
        error = {"error": {"message": "out of memory", "type": "server_error", "code": "kv_full"}}
        handler.send(events(chat_chunk("so far"), error, done=False))
        handler.end_events()

    server.chat = fail_midway
    with Loraplex(server.url) as client, client.chat("x", model="base", stream=True) as stream:
        assert next(stream).text == "so far"
        with pytest.raises(APIError, match="out of memory") as caught:
            next(stream)
        assert (caught.value.code, caught.value.type, caught.value.status_code) == ("kv_full", "server_error", None)
        assert stream.text == "so far"
        assert list(stream) == []


def test_an_error_event_raises_in_both_clients(driver: Driver) -> None:
    script = Script(event_stream(events({"error": {"message": "boom", "code": 500}})))
    with pytest.raises(APIError, match="boom"):
        driver.stream(script, "chat", "x", model="base")
    assert len(script.requests) == 1


def test_the_word_error_in_a_text_is_no_error(driver: Driver) -> None:
    script = Script(event_stream(events(chat_chunk('{"error": 1}'), {**chat_chunk("x"), "error": None})))
    assert [chunk.text for chunk in driver.stream(script, "chat", "x", model="base")] == ['{"error": 1}', "x"]


def test_a_stream_without_its_end_is_an_error(driver: Driver) -> None:
    with pytest.raises(APIConnectionError, match="before the answer was complete"):
        driver.stream(Script(event_stream(events(chat_chunk("half"), done=False))), "chat", "x", model="base")


@pytest.mark.parametrize("content", [b"data: {\n\n", b"data: 7\n\n", b"data: \xff\n\n"])
def test_an_event_that_is_no_chunk_is_an_error(driver: Driver, content: bytes) -> None:
    with pytest.raises(ResponseFormatError):
        driver.stream(Script(event_stream(content)), "chat", "x", model="base")


def test_an_answer_that_is_no_stream_is_an_error(driver: Driver) -> None:
    with pytest.raises(ResponseFormatError, match="event stream"):
        driver.stream(Script(httpx.Response(200, json=chat_answer())), "chat", "x", model="base")


def test_errors_before_the_stream_are_retried_or_raised(driver: Driver) -> None:
    script = Script(error_answer(503, {"retry-after": "2"}), event_stream(events(chat_chunk("ok"))))
    assert [chunk.text for chunk in driver.stream(script, "chat", "x", model="base")] == ["ok"]
    assert driver.pauses_s == [2.0]
    with pytest.raises(NotFoundError):
        driver.stream(Script(error_answer(404)), "chat", "x", model="gone")


def test_chunks_arrive_while_the_server_is_still_working(server: FakeServer) -> None:
    read = threading.Event()

    def wait_for_the_reader(handler: Handler, _seen: Seen) -> None:
        handler.start_events()
        handler.send_event(chat_chunk("first"))
        assert read.wait(10)
        handler.send_event(chat_chunk(" second"))
        handler.end_events()

    server.chat = wait_for_the_reader
    with Loraplex(server.url) as client, client.chat("x", model="base", stream=True) as stream:
        assert next(stream).text == "first"
        read.set()
        assert [chunk.text for chunk in stream] == [" second"]
        assert stream.text == "first second"
        assert stream.served.adapter == "pirate"


def test_a_finished_stream_gives_its_connection_back(server: FakeServer) -> None:
    with Loraplex(server.url) as client:
        for _ in range(3):
            assert "".join(chunk.text for chunk in client.chat("x", model="base", stream=True)) == "base heard: x"
    assert len({seen.port for seen in server.seen}) == 1


def endless(left: threading.Event) -> object:
    def stream(handler: Handler, _seen: Seen) -> None:
        handler.start_events()
        try:
            while True:
                handler.send_event(chat_chunk("on "))
                time.sleep(0.005)
        except OSError:
            left.set()

    return stream


def test_leaving_the_block_closes_the_connection(server: FakeServer) -> None:
    left = threading.Event()
    server.chat = endless(left)  # type: ignore[assignment]
    with Loraplex(server.url) as client:
        with client.chat("x", model="base", stream=True) as stream:
            assert next(stream).text == "on "
        assert left.wait(5)
        assert list(stream) == []


def test_leaving_the_async_block_closes_the_connection(server: FakeServer) -> None:
    left = threading.Event()
    server.chat = endless(left)  # type: ignore[assignment]

    async def main() -> None:
        async with AsyncLoraplex(server.url) as client:
            async with await client.chat("x", model="base", stream=True) as stream:
                assert (await anext(stream)).text == "on "
            assert await asyncio.to_thread(left.wait, 5)

    asyncio.run(main())


def test_cancelling_the_reader_closes_the_connection(server: FakeServer) -> None:
    left = threading.Event()
    server.chat = endless(left)  # type: ignore[assignment]

    async def read_forever(client: AsyncLoraplex) -> None:
        async with await client.chat("x", model="base", stream=True) as stream:
            async for _ in stream:
                pass

    async def main() -> None:
        async with AsyncLoraplex(server.url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read_forever(client), 0.2)
            assert await asyncio.to_thread(left.wait, 5)

    asyncio.run(main())


def test_a_connection_cut_in_mid_stream_is_an_error(server: FakeServer) -> None:
    def cut(handler: Handler, _seen: Seen) -> None:
        handler.start_events()
        handler.send_event(chat_chunk("half"))
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    server.chat = cut
    with Loraplex(server.url) as client, client.chat("x", model="base", stream=True) as stream:
        assert next(stream).text == "half"
        with pytest.raises(APIConnectionError):
            next(stream)


def test_a_closed_port_is_a_connection_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        Loraplex(f"http://127.0.0.1:{port}", max_retries=0) as client,
        pytest.raises(APIConnectionError, match=str(port)),
    ):
        client.chat("x", model="base", stream=True)
