"""`loraplex_client` and the commands built on it, against a real server."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_client import AsyncLoraplex, ConflictError, Loraplex, NotFoundError
from loraplex_server.demo import DEMO_ADAPTERS
from tests.e2e.serving import ADMIN_KEY, ANSWERS, BASE, QUESTION, USER_KEY, ServerProcess, loraplex

pytestmark = pytest.mark.e2e

EMOJI = DEMO_ADAPTERS["emoji"]
EMOJI_ANSWER = "🌍 The capital of France is Paris."


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Loraplex]:
    with Loraplex(server.url, api_key=USER_KEY, admin_key=ADMIN_KEY, max_retries=0) as client:
        yield client


def test_an_adapter_is_uploaded_used_and_deleted(client: Loraplex) -> None:
    adapter = client.adapters.upload(EMOJI, name="fresh")
    assert (adapter.version, adapter.rank, adapter.base) == (1, 6, BASE)
    answer = client.chat(QUESTION, model="fresh", temperature=0)
    assert answer.text == EMOJI_ANSWER
    assert (answer.served.adapter, answer.served.mode) == ("fresh@1", "unmerged")
    assert client.adapters.show("fresh").residency == "gpu"
    deleted = client.adapters.delete("fresh")
    assert deleted.freed_bytes > 100_000
    with pytest.raises(NotFoundError):
        client.chat(QUESTION, model="fresh")


def test_a_taken_name_needs_replace_and_keeps_its_versions(client: Loraplex) -> None:
    client.adapters.upload(DEMO_ADAPTERS["shout"], name="style")
    with pytest.raises(ConflictError, match="style"):
        client.adapters.upload(DEMO_ADAPTERS["pirate"], name="style")
    second = client.adapters.upload(DEMO_ADAPTERS["pirate"], name="style", replace=True)
    assert second.version == 2
    assert client.chat(QUESTION, model="style", temperature=0).text == ANSWERS["pirate"]
    assert client.chat(QUESTION, model="style@1", temperature=0).text == ANSWERS["shout"]
    client.adapters.update("style", version=1)
    assert client.chat(QUESTION, model="style", temperature=0).text == ANSWERS["shout"]
    client.adapters.delete("style")


def test_an_alias_answers_as_its_adapter(client: Loraplex) -> None:
    client.adapters.update("shout", alias="loud")
    assert client.chat(QUESTION, model="loud", temperature=0).text == ANSWERS["shout"]
    client.adapters.delete("loud")
    assert client.chat(QUESTION, model="shout", temperature=0).text == ANSWERS["shout"]
    with pytest.raises(NotFoundError):
        client.chat(QUESTION, model="loud")


def test_text_streams_and_completions_come_typed(client: Loraplex) -> None:
    with client.chat(QUESTION, model="json", stream=True, temperature=0) as stream:
        assert "".join(chunk.text for chunk in stream) == ANSWERS["json"]
    assert client.completions("The capital of", max_tokens=3, temperature=0).usage.completion_tokens == 3
    assert client.detokenize(client.tokenize("Good day").tokens).endswith("Good day")
    assert client.ready()
    assert client.base_model() == BASE


@pytest.mark.anyio
async def test_the_async_client_does_the_same(server: ServerProcess) -> None:
    async with AsyncLoraplex(server.url, api_key=USER_KEY, admin_key=ADMIN_KEY) as client:
        await client.adapters.upload(EMOJI, name="fresh-async")
        answer = await client.chat(QUESTION, model="fresh-async", temperature=0)
        assert answer.text == EMOJI_ANSWER
        await client.adapters.delete("fresh-async")


def connection(server: ServerProcess, key: str) -> list[str]:
    flag = "--admin-key" if key == ADMIN_KEY else "--api-key"
    return ["--base-url", server.url, flag, key]


def test_the_chat_command_answers_and_leaves(server: ServerProcess) -> None:
    done = loraplex("chat", QUESTION, "--model", "shout", "--temperature", "0", *connection(server, USER_KEY))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ANSWERS["shout"]


def test_the_chat_command_reads_a_pipe(server: ServerProcess) -> None:
    done = loraplex("chat", "-m", "pirate", "--temperature", "0", *connection(server, USER_KEY), stdin=QUESTION)
    assert done.stdout.strip() == ANSWERS["pirate"], done.stderr


def test_the_chat_command_says_in_one_line_what_is_wrong(server: ServerProcess) -> None:
    unknown = loraplex("chat", "hi", "--model", "nobody", *connection(server, USER_KEY))
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("error: The model `nobody` does not exist.")
    locked = loraplex("chat", "hi", "--base-url", server.url)
    assert locked.returncode == 1
    assert "LORAPLEX_API_KEY" in locked.stderr
    nowhere = loraplex("chat", "hi", "--base-url", "http://127.0.0.1:9")
    assert nowhere.returncode == 1
    assert "no server answers at" in nowhere.stderr
    for done in (unknown, locked, nowhere):
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_operators_manage_adapters_from_a_shell(server: ServerProcess, tmp_path: Path) -> None:
    where = connection(server, ADMIN_KEY)

    def run(*arguments: str) -> str:
        done = loraplex("adapters", *arguments, *where)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "shell is published as version 1" in run("upload", str(EMOJI), "--name", "shell")
    listed = run("list")
    assert all(name in listed for name in ("shout", "json", "pirate", "shell"))
    assert json.loads(run("show", "shell", "--json"))["rank"] == 6
    run("pin", "shell")
    assert json.loads(run("show", "shell", "--json"))["pinned"] is True
    assert "1" in run("versions", "shell")
    refused = loraplex("adapters", "upload", str(tmp_path / "nothing"), *where)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    run("unpin", "shell")
    assert "shell" in run("delete", "shell")
    assert server.user.get("/v1/models/shell").status_code == 404
