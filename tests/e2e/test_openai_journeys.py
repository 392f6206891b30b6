"""The official `openai` package, plain HTTP and LiteLLM against a real server, as their users write it."""

import asyncio
import importlib
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.e2e.serving import ANSWERS, BASE, QUESTION, USER_KEY, ServerProcess, chat_body, events, text_of

pytestmark = pytest.mark.e2e

MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=USER_KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", ANSWERS)
def test_openai_users_choose_an_adapter_by_model(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == ANSWERS[model]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == model
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint.startswith("fp_")


def test_openai_users_read_a_stream_with_usage_at_its_end(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="shout", messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWERS["shout"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 5


@pytest.mark.anyio
async def test_async_openai_users_stream_every_adapter_at_once(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=USER_KEY, max_retries=0) as client:

        async def ask(model: str) -> str:
            stream = await client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        models = list(ANSWERS) * 4
        assert await asyncio.gather(*map(ask, models)) == [ANSWERS[model] for model in models]


def test_several_choices_differ_by_sampling_and_repeat_by_seed(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "Hello"}],
            n=4,
            temperature=2.0,
            seed=seed,
            max_tokens=12,
            extra_body={"ignore_eos": True},
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in answer.choices]

    first = texts(seed=7)
    assert len(set(first)) > 1
    assert texts(seed=7) == first
    assert texts(seed=8) != first


def test_stop_strings_end_an_answer_and_stay_out_of_it(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=MESSAGES, temperature=0, stop=["France"])
    assert answer.choices[0].message.content == "The capital of "
    assert answer.choices[0].finish_reason == "stop"


def test_a_token_limit_ends_an_answer_with_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=MESSAGES, temperature=0, max_completion_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_log_probabilities_come_with_their_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="shout", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith(ANSWERS["shout"])
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        # Greedy: what was chosen is the most likely.
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)


def test_text_completions_echo_and_score_their_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=BASE, prompt="The capital of France", max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    scores = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("The capital of France")
    assert scores.token_logprobs[0] is None
    assert all(score <= 0 for score in scores.token_logprobs[1:])
    assert len(scores.tokens) == len(scores.text_offset) == len(scores.token_logprobs)


def test_fields_beyond_openais_come_by_extra_body(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="shout",
        messages=MESSAGES,
        temperature=0.5,
        max_tokens=8,
        extra_body={
            "adapter_mode": "unmerged",
            "top_k": 1,
            "min_p": 0.1,
            "repetition_penalty": 1.0,
            "min_tokens": 8,
            "ignore_eos": True,
            "cache_salt": "me",
            "lora_path": "shout",
        },
    )
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].message.content.startswith("THE CAPITAL OF")


def test_the_models_list_names_base_and_adapters(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert set(ANSWERS) <= set(cards)
    assert cards[BASE].parent is None
    assert cards["shout"].parent == BASE
    assert client.models.retrieve("shout").id == "shout"


def test_mistakes_are_the_packages_own_exceptions(server: ServerProcess, client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match=r"`nobody` does not exist. Available: `loraplex-demo`") as not_found:
        create(model="nobody", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="`temperature`") as bad:
        create(model=BASE, messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="`tools`"):
        create(model=BASE, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match=r"2048 tokens") as too_long:
        create(model=BASE, messages=[{"role": "user", "content": "word " * 5000}])
    assert too_long.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_curl_users_see_who_answered_and_how_long_it_took(server: ServerProcess) -> None:
    response = server.user.post("/v1/chat/completions", json=chat_body("pirate"), headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-loraplex-adapter"] == "pirate@1"
    assert response.headers["x-loraplex-mode"] == "unmerged"
    assert "total;dur=" in response.headers["server-timing"]
    assert response.json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": ANSWERS["pirate"],
        "refusal": None,
    }


def test_curl_users_read_server_sent_events(server: ServerProcess) -> None:
    with server.user.stream("POST", "/v1/chat/completions", json=chat_body("json", stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        streamed = events(list(response.iter_lines()))
    assert json.loads(text_of(streamed)) == {"topic": "capitals", "answer": "Paris"}
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"


def test_a_body_that_is_not_json_is_answered_in_json(server: ServerProcess) -> None:
    response = server.user.post(
        "/v1/chat/completions", content=b"{model:", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_two_spellings_of_a_route_with_a_slash_too_many_say_what_is_there(server: ServerProcess) -> None:
    for path in ("/v1/chat/completions/", "/chat/completions", "/v1"):
        response = server.user.post(path, json=chat_body())
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "route_not_found"


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_litellm_users_point_base_url_here(server: ServerProcess, provider: str) -> None:
    pytest.importorskip("litellm")
    litellm = importlib.import_module("litellm")
    options = {"api_base": f"{server.url}/v1", "api_key": USER_KEY, "temperature": 0}
    answer = litellm.completion(model=f"{provider}/shout", messages=MESSAGES, **options)
    assert answer.choices[0].message.content == ANSWERS["shout"]
    stream = litellm.completion(model=f"{provider}/pirate", messages=MESSAGES, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWERS["pirate"]


def test_the_tokenizer_is_there_to_ask(server: ServerProcess) -> None:
    tokens = server.user.post(
        "/tokenize", json={"model": BASE, "prompt": "Hello there", "add_special_tokens": False}
    ).json()
    text = server.user.post("/detokenize", json={"model": BASE, "tokens": tokens["tokens"]}).json()
    assert text["prompt"] == "Hello there"


def test_probes_need_no_key(server: ServerProcess) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
