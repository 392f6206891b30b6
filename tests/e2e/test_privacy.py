"""What users ask is nobody else's business: not in the log, not in metrics, not in errors, not in another's cache."""

import uuid

import pytest

from loraplex_server.demo import DEMO_ADAPTERS
from tests.e2e.making import CONFIG, zip_of
from tests.e2e.serving import BASE, ServerProcess, chat_body

pytestmark = pytest.mark.e2e


def test_prompts_and_answers_stay_out_of_log_and_metrics(server: ServerProcess) -> None:
    canary = f"canary{uuid.uuid4().hex}"
    say = [{"role": "system", "content": f"You are {canary}."}, {"role": "user", "content": f"Repeat {canary}."}]
    chat = "/v1/chat/completions"
    statuses = [
        server.user.post(chat, json={"model": "shout", "messages": say}),
        server.user.post(chat, json={"model": "json", "messages": say, "stream": True}),
        server.user.post(chat, json={"model": BASE, "messages": say, "stop": [canary], "user": canary}),
        server.user.post(chat, json={"model": BASE, "messages": say, "cache_salt": canary, "logprobs": True}),
        server.user.post(chat, json={"model": BASE, "messages": say * 500}),
        server.user.post(chat, json={"model": BASE, "messages": say, "temperature": canary}),
        server.user.post(chat, json={"model": BASE, "messages": [{"role": canary, "content": canary}]}),
        server.user.post(chat, json={"model": f"no-{canary}", "messages": say}),
        server.user.post(chat, json={"model": BASE, "messages": say, canary: 1}),
        server.user.post(chat, json={"model": BASE, "messages": say, "chat_template_kwargs": {"x": canary}}),
        server.user.post(chat, json={"model": BASE, "messages": say}, headers={"x-request-id": f"{canary} {canary}"}),
        server.user.post(chat, content=f'{{"model": "{canary}'.encode(), headers={"content-type": "application/json"}),
        server.user.post("/v1/completions", json={"model": BASE, "prompt": canary, "echo": True, "max_tokens": 1}),
        server.user.post("/tokenize", json={"model": BASE, "prompt": canary}),
        server.user.post(f"/v1/{canary}", json={}),
        server.user.get(f"/v1/models/{canary}"),
        server.user.get("/v1/models", headers={"authorization": f"Bearer {canary}"}),
        server.admin.get(f"/v1/adapters/{canary}"),
        server.admin.delete(f"/v1/adapters/{canary}"),
        server.admin.post("/v1/adapters", json={"name": canary, "source": f"/nowhere/{canary}"}),
        server.upload_archive(canary, zip_of({CONFIG: canary.encode(), f"{canary}.txt": b""})),
        server.admin.post("/v1/load_lora_adapter", json={"lora_name": canary, "lora_path": f"/nowhere/{canary}"}),
    ]
    assert all(response.status_code < 500 for response in statuses), [r.status_code for r in statuses]
    assert canary not in server.log_text()
    assert canary not in server.user.get("/metrics").text
    others = [server.chat(content="hello", temperature="x"), server.chat("nobody"), server.user.get("/v1/models")]
    assert all(canary not in response.text for response in others)


def test_a_prefix_is_shared_with_nobody_of_another_salt_or_adapter(server: ServerProcess) -> None:
    prompt = f"{uuid.uuid4().hex} " + "Tell me something about the capital of France. " * 8

    def cached(model: str, salt: str | None) -> int:
        answer = server.user.post(
            "/v1/chat/completions",
            json=chat_body(model, prompt, max_tokens=1, **({"cache_salt": salt} if salt else {})),
        )
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(BASE, "alice") == 0
    assert cached(BASE, "alice") > 32
    assert cached(BASE, "bob") == 0
    assert cached(BASE, None) == 0
    assert cached("shout", "alice") == 0
    assert cached("pirate", "alice") == 0
    assert cached("shout", "alice") > 32
    assert cached(BASE, "alice") > 32


def test_a_prefix_is_not_shared_across_versions_of_a_name(server: ServerProcess) -> None:
    prompt = f"{uuid.uuid4().hex} " + "What is the opposite of hot? " * 12

    def ask() -> tuple[str, int]:
        answer = server.chat("renewed", prompt, max_tokens=24).json()
        usage = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["message"]["content"], usage

    assert server.upload("renewed", DEMO_ADAPTERS["shout"]).status_code == 201
    old, _ = ask()
    again, hits = ask()
    assert (again, hits > 32) == (old, True)
    assert server.upload("renewed", DEMO_ADAPTERS["pirate"], replace="true").status_code == 201
    new, hits = ask()
    assert hits == 0
    assert new != old
    assert server.admin.delete("/v1/adapters/renewed").status_code == 200
