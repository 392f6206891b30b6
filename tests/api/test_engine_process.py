"""Streams out of an engine in a process of its own, over the whole road: bridge, detokenizer, events, socket."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from loraplex_server.engine.process import EngineProcess
from loraplex_server.engine.worker import Worker
from tests.api.servers import Server, scripted_services, serve, wait_until
from tests.engine.hosting import CountingRecipe

ASK = [{"role": "user", "content": "Hi"}]
STREAMS, TOKENS = 16, 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    host = EngineProcess(CountingRecipe(step_s=0.0005))
    facts = host.load()
    worker = Worker(host, max_model_len=facts.max_model_len, max_waiting=100, max_waiting_tokens=10_000)
    with serve(replace(scripted_services(tmp_path_factory.mktemp("process")), worker=worker)) as server:
        yield server


def stream(server: Server) -> tuple[str, int]:
    """One answer's text and what its usage says."""
    text, num_tokens = "", 0
    for chunk in server.openai().chat.completions.create(
        model="base-model", messages=ASK, max_tokens=TOKENS, stream=True, stream_options={"include_usage": True}
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
    return text, num_tokens


def test_streams_side_by_side_each_get_all_of_their_own(server: Server) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        found = list(pool.map(lambda _: stream(server), range(STREAMS)))
    # The engine counts, and the tokenizer's first 256 tokens are the bytes.
    assert found == [(bytes(range(TOKENS)).decode(), TOKENS)] * STREAMS


def test_a_client_that_leaves_frees_its_place_in_the_other_process(server: Server) -> None:
    body = {"model": "base-model", "messages": ASK, "max_tokens": 200, "stream": True}
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    wait_until(lambda: server.worker.stats.num_running == 0)
    assert server.worker.running
