"""P6: chat templates cannot execute or stall, whatever the messages and variables hold."""

import threading
import time
from pathlib import Path

import pytest

from loraplex_server.services import HttpLimits
from loraplex_server.time_limit import TimeLimit
from loraplex_server.tokenizer import ChatTemplateError, NoChatTemplate, Tokenizer
from tests.api.servers import scripted_services, serve, wait_until
from tests.models import make_tokenizer

INJECTIONS = [
    "{{ 7 * 7 }}",
    "{% for x in range(99999999) %}a{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('true') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages[0].__class__ }}",
    "{% include '/etc/passwd' %}",
    "{% raw %}{{ x }}",
    "{{ raise_exception('x') }}",
]

STALLING = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}x"


def tokenizer(template: str | None = None) -> Tokenizer:
    return Tokenizer(make_tokenizer(), template)


@pytest.mark.parametrize("text", INJECTIONS)
def test_messages_and_variables_are_data(text: str) -> None:
    rendered = tokenizer("{{ messages[0].content }}|{{ extra }}").render_chat(
        [{"role": "user", "content": text}], {"extra": text}
    )
    assert rendered == f"{text}|{text}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages[0].content.__class__.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% include 'x' %}",
    ],
)
def test_a_hostile_template_stays_in_its_sandbox(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        tokenizer(template).render_chat([{"role": "user", "content": "x"}], {})


@pytest.mark.parametrize("name", ["messages", "chat_template", "tokenize", "tools", "bos_token", "self"])
def test_variables_replace_nothing_of_ours(name: str) -> None:
    with pytest.raises(ChatTemplateError, match=name):
        tokenizer().render_chat([{"role": "user", "content": "x"}], {name: "x"})


def test_a_broken_template_is_found_at_the_start() -> None:
    with pytest.raises(ValueError, match="line 1"):
        tokenizer("{% if %}")


def test_a_template_file_replaces_the_models_own(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "other.jinja").write_text("<{{ messages[0].content }}>")
    loaded = Tokenizer.load(tmp_path, tmp_path / "other.jinja")
    assert loaded.render_chat([{"role": "user", "content": "x"}], {}) == "<x>"
    assert Tokenizer.load(tmp_path).render_chat([{"role": "user", "content": "x"}], {}).startswith("<|bos|>")


def test_without_a_template_the_message_names_the_way_out() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(NoChatTemplate, match="/v1/completions"):
        Tokenizer(bare).render_chat([{"role": "user", "content": "x"}], {})


def test_a_templates_own_refusal_reaches_the_user(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'user' %}{{ raise_exception('begin with a system message') }}{% endif %}"
    body = {"model": "base-model", "messages": [{"role": "user", "content": "x"}]}
    with serve(scripted_services(tmp_path, chat_template=template)) as server, server.http() as http:
        response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "begin with a system message" in response.json()["error"]["message"]


def test_a_stalling_template_is_interrupted_and_hurts_nobody(tmp_path: Path) -> None:
    # Reached by a variable only, so that the start does not run it.
    template = "{% if slow is defined %}" + STALLING + "{% else %}quick{% endif %}"
    services = scripted_services(tmp_path, chat_template=template, limits=HttpLimits(template_timeout_s=0.3))
    body = {"model": "base-model", "messages": [{"role": "user", "content": "x"}]}
    with serve(services) as server, server.http() as http:
        for _ in range(6):
            begun = time.monotonic()
            slow = http.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"slow": True}})
            assert time.monotonic() - begun < 5
            assert (slow.status_code, slow.json()["error"]["code"]) == (400, "chat_template_timeout")
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "time-limit"])


@pytest.mark.anyio
async def test_a_time_limit_passes_results_and_errors_on() -> None:
    limit = TimeLimit(5.0)
    assert await limit.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await limit.run(lambda: 1 // 0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
