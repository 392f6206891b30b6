"""Text completions through the official client, on a real socket."""

import json
from collections.abc import Iterator

import pytest

from tests.api.scripted import say
from tests.api.servers import Server, scripted_services, serve

PROMPT = "Once upon"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(scripted_services(tmp_path_factory.mktemp("completions"), adapters=("poet",))) as server:
        yield server


@pytest.fixture(autouse=True)
def _script(server: Server) -> None:
    server.worker.script = say(" a time")
    server.worker.requests.clear()


def test_an_answer_has_openais_form(server: Server) -> None:
    answer = server.openai().completions.create(model="poet", prompt=PROMPT)
    assert (answer.object, answer.model) == ("text_completion", "poet")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" a time", "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)


def test_sixteen_tokens_unless_asked_otherwise(server: Server) -> None:
    server.openai().completions.create(model="poet", prompt=PROMPT)
    assert server.worker.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 98], [(97, 98)]),
        ([[97, 98], [99]], [(97, 98), (99,)]),
    ],
)
def test_prompts_come_in_four_forms(server: Server, prompt: object, expected: list[tuple[int, ...]]) -> None:
    answer = server.openai().completions.create(model="poet", prompt=prompt)  # type: ignore[call-overload]
    assert [request.prompt_ids for request in server.worker.requests] == expected
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))


def test_n_answers_to_each_prompt_in_order(server: Server) -> None:
    answer = server.openai().completions.create(model="poet", prompt=["a", "bb"], n=2)
    assert [request.prompt_ids for request in server.worker.requests] == [(97,), (97,), (98, 98), (98, 98)]
    assert len(answer.choices) == 4
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


@pytest.mark.parametrize("as_ids", [False, True])
def test_legacy_logprobs_are_parallel_lists(server: Server, as_ids: bool) -> None:
    server.worker.script = say("é!")
    answer = server.openai().completions.create(
        model="poet", prompt=PROMPT, logprobs=2, extra_body={"return_tokens_as_token_ids": as_ids}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 0, 1]
    assert logprobs.tokens == (["token_id:195", "token_id:169", "token_id:33"] if as_ids else ["\ufffd", "\ufffd", "!"])
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[2] == (
        {"token_id:33": -0.5, "token_id:34": -1.5} if as_ids else {"!": -0.5, '"': -1.5}
    )


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]])
def test_echo_scores_the_prompt(server: Server, max_tokens: int, prompt: object) -> None:
    answer = server.openai().completions.create(  # type: ignore[call-overload]
        model="poet", prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens
    )
    choice = answer.choices[0]
    assert choice.text == ("abc" if max_tokens == 0 else "abc ")
    assert choice.finish_reason == "length"
    assert choice.logprobs.tokens == list(choice.text)
    assert choice.logprobs.token_logprobs == [None] + [-0.5] * (len(choice.text) - 1)
    assert choice.logprobs.top_logprobs[:2] == [None, {"b": -0.5}]
    assert choice.logprobs.text_offset == list(range(len(choice.text)))
    assert answer.usage.completion_tokens == max_tokens
    assert server.worker.requests[0].sampling.num_prompt_logprobs == 1


def test_a_stream_joins_to_the_whole_answer(server: Server) -> None:
    client = server.openai().completions
    whole = client.create(model="poet", prompt=["ab", "c"], echo=True, logprobs=1, n=2)
    parts: dict[int, dict[str, list[object]]] = {i: {"text": [], "tokens": [], "offsets": []} for i in range(4)}
    stream = client.create(model="poet", prompt=["ab", "c"], echo=True, logprobs=1, n=2, stream=True)
    for chunk in stream:
        for choice in chunk.choices:
            assert choice.logprobs is not None
            parts[choice.index]["text"].append(choice.text)
            parts[choice.index]["tokens"] += choice.logprobs.tokens or []
            parts[choice.index]["offsets"] += choice.logprobs.text_offset or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert "".join(map(str, parts[choice.index]["text"])) == choice.text
        assert parts[choice.index]["tokens"] == choice.logprobs.tokens
        assert parts[choice.index]["offsets"] == choice.logprobs.text_offset


def test_a_streams_last_event_counts_tokens_if_asked(server: Server) -> None:
    with server.http() as http:
        body = {"model": "poet", "prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
        lines = [line for line in http.post("/v1/completions", json=body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 2


def test_what_load_generators_send_is_accepted(server: Server) -> None:
    with server.http() as http:
        body = {
            "model": "poet",
            "prompt": "ab",
            "temperature": 0.0,
            "best_of": 1,
            "max_tokens": 4,
            "stream": False,
            "ignore_eos": True,
            "lora_path": "poet",
            "repetition_penalty": 1.0,
            "logprobs": None,
            "suffix": None,
        }
        response = http.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == " a t"
