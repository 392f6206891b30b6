"""Chat completions through the official client, on a real socket."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from loraplex_server.engine.messages import TokenOutput
from loraplex_server.engine.sequence import Request
from tests.api.scripted import fail, say
from tests.api.servers import Server, scripted_services, serve

ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    services = scripted_services(tmp_path_factory.mktemp("chat"), adapters=("poet", "org/coder"))
    services.registry.update("poet", alias="bard")
    with serve(services) as server:
        yield server


@pytest.fixture(autouse=True)
def _hello(server: Server) -> None:
    server.worker.script = say("Hello, world")
    server.worker.requests.clear()
    server.worker.aborted.clear()


def test_an_answer_has_openais_form(server: Server) -> None:
    answer = server.openai().chat.completions.create(model="base-model", messages=ASK)
    assert answer.object == "chat.completion"
    assert answer.model == "base-model"
    assert answer.system_fingerprint == "fp_ba5eba5eba5e"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello, world", "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("user: Hi") + len("assistant: ") + 2
    assert answer.usage.completion_tokens == len("Hello, world") + 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_headers_say_who_answered(server: Server) -> None:
    raw = server.openai().chat.completions.with_raw_response.create(model="bard", messages=ASK)
    assert raw.headers["x-loraplex-adapter"] == "poet@1"
    assert raw.headers["x-loraplex-mode"] == "unmerged"
    assert raw.headers["x-request-id"].startswith("req-")
    assert {part.split(";")[0] for part in raw.headers["server-timing"].split(", ")} == {
        "encode",
        "queue",
        "first-token",
        "total",
    }
    assert raw.parse().system_fingerprint == "fp_ba5eba5eba5e_000000000000"
    assert server.worker.requests[0].adapter == "00" * 32


def test_the_request_id_is_taken_over_if_it_is_sane(server: Server) -> None:
    with server.http() as http:
        assert http.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        odd = http.get("/health", headers={"x-request-id": "a b<script>"}).headers["x-request-id"]
        assert odd.startswith("req-")


@pytest.mark.parametrize("name", ["base-model", "base-alias", "poet", "bard", "poet@1", "org/coder"])
def test_models_answer_by_every_name(server: Server, name: str) -> None:
    answer = server.openai().chat.completions.create(model=name, messages=ASK)
    assert answer.model == name


def test_a_stream_is_role_text_reason_usage_and_done(server: Server) -> None:
    body = {"model": "poet", "messages": ASK, "stream": True, "stream_options": {"include_usage": True}}
    with server.http() as http:
        response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = [c["choices"][0]["delta"].get("content", "") for c in chunks[1:-1]]
    assert "".join(text) == "Hello, world"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len("Hello, world") + 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_the_official_client_reads_the_stream(server: Server) -> None:
    stream = server.openai().chat.completions.create(model="poet", messages=ASK, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello, world"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


def test_characters_are_never_cut(server: Server) -> None:
    text = "naïve 日本語 😀!"
    server.worker.script = say(text)
    stream = server.openai().chat.completions.create(model="poet", messages=ASK, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_have_seeds_of_their_own(server: Server, stream: bool) -> None:
    def script(request: object) -> object:
        return say(f"answer {request.sampling.seed}")(request)  # type: ignore[attr-defined, arg-type]

    server.worker.script = script
    client = server.openai().chat.completions
    if stream:
        texts = ["", "", ""]
        for chunk in client.create(model="poet", messages=ASK, n=3, seed=7, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        answer = client.create(model="poet", messages=ASK, n=3, seed=7)
        texts = [choice.message.content or "" for choice in answer.choices]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(server.worker.requests[0].prompt_ids)
        assert answer.usage.completion_tokens == 3 * len("answer 7!")
    assert texts == ["answer 7", "answer 8", "answer 9"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["o, w", ["zzz", "o, w"]])
def test_stop_strings_end_the_text_across_tokens(server: Server, stream: bool, stop: str | list[str]) -> None:
    client = server.openai().chat.completions
    if stream:
        chunks = list(client.create(model="poet", messages=ASK, stop=stop, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.create(model="poet", messages=ASK, stop=stop).choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
    assert (text, reason) == ("Hell", "stop")
    assert not server.worker.running_ids


def test_max_tokens_ends_with_length(server: Server) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        answer = server.openai().chat.completions.create(model="poet", messages=ASK, extra_body={field: 3})
        assert answer.choices[0].message.content == "Hel"
        assert answer.choices[0].finish_reason == "length"


def test_without_a_limit_the_rest_of_the_context_is_used(server: Server) -> None:
    server.openai().chat.completions.create(model="poet", messages=ASK)
    request = server.worker.requests[0]
    assert request.sampling.max_tokens == 512 - len(request.prompt_ids)


def test_logprobs_name_each_token_and_its_rivals(server: Server) -> None:
    server.worker.script = say("hé")
    answer = server.openai().chat.completions.create(model="poet", messages=ASK, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.bytes for token in logprobs.content] == [[0x68], [0xC3], [0xA9]]
    assert [token.token for token in logprobs.content] == ["h", "\ufffd", "\ufffd"]
    assert logprobs.content[0].logprob == -0.5
    assert [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs] == [("h", -0.5), ("i", -1.5)]


def test_a_streams_logprobs_are_those_of_the_whole(server: Server) -> None:
    server.worker.script = say("a é b", per_output=2)
    whole = server.openai().chat.completions.create(model="poet", messages=ASK, logprobs=True)
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    tokens = []
    for chunk in server.openai().chat.completions.create(model="poet", messages=ASK, logprobs=True, stream=True):
        scores = chunk.choices[0].logprobs
        tokens += (scores.content or []) if scores else []
    assert [token.bytes for token in tokens] == [token.bytes for token in whole.choices[0].logprobs.content]


def test_logprobs_cover_the_text_that_is_answered(server: Server) -> None:
    answer = server.openai().chat.completions.create(model="poet", messages=ASK, logprobs=True, stop="wor")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(token.token for token in logprobs.content or []) == answer.choices[0].message.content == "Hello, "


def test_sampling_reaches_the_engine(server: Server) -> None:
    server.openai().chat.completions.create(
        model="poet",
        messages=ASK,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        logit_bias={"65": 5},
        seed=3,
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [66],
            "cache_salt": "tenant",
        },
    )
    request = server.worker.requests[0]
    params = request.sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.1, -0.1, 1.2)
    assert (params.logit_bias, params.seed, params.min_tokens) == (((65, 5.0),), 3, 2)
    assert (params.stop_token_ids, params.ignore_eos) == ((66,), True)
    assert request.salt == "tenant"


def test_the_template_gets_messages_and_variables(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}{% if mood is defined %}({{ mood }}){% endif %}"
    with serve(scripted_services(tmp_path, chat_template=template)) as server:
        server.openai().chat.completions.create(
            model="base-model",
            messages=[
                {"role": "developer", "content": "Be {{ 7 * 7 }}"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None},
            ],
            extra_body={"chat_template_kwargs": {"mood": "{{ messages }}"}},
        )
        prompt = bytes(server.worker.requests[0].prompt_ids).decode()
    assert prompt == "[system|Be {{ 7 * 7 }}][user|a\nb][assistant|]({{ messages }})"


def test_fields_without_effect_are_accepted(server: Server) -> None:
    answer = server.openai().chat.completions.create(
        model="poet",
        messages=ASK,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        extra_body={
            "adapter_mode": "auto",
            "lora_path": "poet",
            "audio": None,
            "adapters": None,
            "return_cached_tokens_details": True,
        },
    )
    assert answer.choices[0].message.content == "Hello, world"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("adapter_load_failed", 503),
        ("out_of_memory", 503),
        ("context_too_long", 400),
        ("engine_error", 500),
        ("shutting_down", 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_a_status(server: Server, code: str, status: int, stream: bool) -> None:
    server.worker.script = fail(code)
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai().chat.completions.create(model="poet", messages=ASK, stream=stream)
    assert caught.value.status_code == status
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == ("context_length_exceeded" if code == "context_too_long" else code)


def test_an_adapter_unloaded_before_it_was_loaded_is_no_model_any_more(server: Server) -> None:
    server.services.registry.publish("brief", "b1" * 32)

    def unload_then_fail(request: Request) -> Iterable[TokenOutput | float]:
        server.services.registry.retire("brief")
        return fail("adapter_load_failed")(request)

    server.worker.script = unload_then_fail
    with pytest.raises(openai.NotFoundError, match="`brief` does not exist"):
        server.openai().chat.completions.create(model="brief", messages=ASK)


def test_a_failure_in_mid_stream_is_an_event(server: Server) -> None:
    server.worker.script = fail("engine_error", after="Hel")
    stream = server.openai().chat.completions.create(model="poet", messages=ASK, stream=True)
    pieces: list[str] = []
    with pytest.raises(openai.APIError, match="this is engine_error"):
        pieces.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(pieces) == "Hel"


def test_one_failed_answer_gives_up_the_others(server: Server) -> None:
    def script(request: object) -> object:
        failing = request.id.endswith("-1")  # type: ignore[attr-defined]
        return (fail("out_of_memory") if failing else say("x" * 400, pause_s=0.05))(request)  # type: ignore[arg-type]

    server.worker.script = script
    with pytest.raises(openai.InternalServerError):
        server.openai().chat.completions.create(model="poet", messages=ASK, n=2)
    assert not server.worker.running_ids


def test_a_busy_server_says_when_to_come_back(server: Server) -> None:
    server.worker.queue_full_after = 1
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            server.openai().chat.completions.create(model="poet", messages=ASK, n=2)
    finally:
        server.worker.queue_full_after = None
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.response.headers["retry-after-ms"] == "2500"
    assert caught.value.code == "queue_full"
    assert not server.worker.running_ids, "the half that was taken must be given back"


def test_a_stopped_engine_is_a_503(server: Server) -> None:
    server.worker.running = False
    try:
        with server.http() as http:
            assert http.get("/ready").status_code == 503
            assert http.get("/health").status_code == 200
            response = http.post("/v1/chat/completions", json={"model": "poet", "messages": ASK})
    finally:
        server.worker.running = True
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"


def test_lora_path_must_agree_with_the_model(server: Server) -> None:
    with server.http() as http:
        body = {"model": "poet", "messages": ASK, "lora_path": "other"}
        assert http.post("/v1/chat/completions", json=body).status_code == 400


def test_answers_are_plain_http(server: Server) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "poet", "messages": ASK}, trust_env=False)
    assert response.json()["choices"][0]["message"]["content"] == "Hello, world"
