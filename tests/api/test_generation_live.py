"""The HTTP side over the real engine: what is streamed, scored, seeded and given up."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loraplex_server.model.loader import load
from tests.api.live import live_server, save_adapter
from tests.api.servers import Server, wait_until
from tests.models import make_checkpoint

PROMPT = "The quick brown fox"
SHORT: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint's folder."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    decoder = load(reference, device="cpu", dtype=torch.float32, quantization="none")
    with live_server(folder, decoder) as server:
        for seed, name in enumerate(("one", "two")):
            source = save_adapter(folder / name, decoder.base_shape, seed=seed)
            server.services.installer.install_path(name, source)
        yield server


@pytest.mark.parametrize("model", ["tiny", "one", "two"])
def test_a_stream_and_a_whole_answer_are_the_same(server: Server, model: str) -> None:
    client = server.openai().chat.completions
    messages: Any = [{"role": "user", "content": PROMPT}]
    whole = client.create(model=model, messages=messages, **SHORT).choices[0]
    chunks = list(client.create(model=model, messages=messages, stream=True, **SHORT))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_adapters_answer_differently(server: Server) -> None:
    def scores(model: str) -> str:
        as_ids = {"return_tokens_as_token_ids": True}
        answer = server.openai().completions.create(model=model, prompt=PROMPT, logprobs=0, extra_body=as_ids, **SHORT)
        return str(answer.choices[0].logprobs)

    answers = {scores(model) for model in ("tiny", "one", "two")}
    assert len(answers) == 3


def test_an_echoed_prompt_is_scored_as_transformers_scores_it(server: Server, reference: Any) -> None:
    from transformers import AutoModelForCausalLM

    ids = list(PROMPT.encode())
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    for max_tokens in (0, 1):
        answer = server.openai().completions.create(
            model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.tokens is not None
        assert len(logprobs.tokens) == len(ids) + max_tokens
        assert logprobs.token_logprobs[0] is None
        for position, token_id in enumerate(ids[1:]):
            wanted = float(expected[position, token_id])
            assert logprobs.token_logprobs[position + 1] == pytest.approx(wanted, abs=1e-3)


def test_a_seed_repeats_itself_and_its_choices_differ(server: Server) -> None:
    client = server.openai().completions
    ask: dict[str, Any] = {"model": "one", "prompt": PROMPT, "max_tokens": 16, "seed": 5, "temperature": 1.5}
    first, again = client.create(n=3, **ask), client.create(n=3, **ask)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3


def test_a_shared_prompt_is_found_in_the_prefix_cache(server: Server) -> None:
    client = server.openai().completions
    ask: dict[str, Any] = {"model": "two", "prompt": "a prompt of more than two blocks of tokens, twice", **SHORT}
    client.create(**ask)
    usage = client.create(**ask).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 32
    other = client.create(**ask, extra_body={"cache_salt": "another tenant"}).usage
    assert other is not None
    assert other.prompt_tokens_details is not None
    assert other.prompt_tokens_details.cached_tokens == 0


def test_a_client_that_leaves_frees_its_place_in_the_engine(server: Server) -> None:
    body = {"model": "one", "prompt": PROMPT, "max_tokens": 350, "stream": True, "n": 4}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        pieces = response.iter_bytes()
        next(pieces)
    wait_until(lambda: server.worker.stats.num_running == 0 and server.worker.stats.num_waiting == 0)


def test_a_prompt_of_the_whole_context_is_refused(server: Server) -> None:
    with server.http() as http:
        response = http.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 400, "max_tokens": 1})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
