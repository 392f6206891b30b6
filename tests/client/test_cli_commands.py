"""`loraplex chat` and `loraplex adapters` against a server on a real socket."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loraplex_server.commands import chat as chat_module
from loraplex_server.commands.adapters import adapters_app
from loraplex_server.commands.chat import chat
from loraplex_server.commands.rendering import print_table, printable, size

from .drivers import adapter_json, chat_chunk
from .servers import FakeServer, Handler, Seen, stream_words

runner = CliRunner()
chat_app = typer.Typer()
chat_app.command()(chat)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def closed_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def questions(server: FakeServer) -> list[Seen]:
    return [seen for seen in server.seen if seen.path == "/v1/chat/completions"]


# One question


def test_a_prompt_is_answered_on_stdout_and_timed_on_stderr(server: FakeServer) -> None:
    arguments = ["where is it?", "--model", "pirate", "--base-url", server.url, "--api-key", "secret"]
    result = runner.invoke(chat_app, [*arguments, "--system", "Be brief.", "--max-tokens", "9", "--temperature", "0.5"])
    assert (result.exit_code, result.stdout) == (0, "pirate heard: where is it?\n")
    assert "first token" in result.stderr
    assert "tokens/s" in result.stderr
    assert "5 tokens" in result.stderr
    (seen,) = questions(server)
    assert seen.authorization == "Bearer secret"
    assert seen.json == {
        "model": "pirate",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "where is it?"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_prompt_may_come_from_a_pipe_and_the_address_from_the_environment(server: FakeServer) -> None:
    result = runner.invoke(chat_app, [], input="from a pipe\n", env={"LORAPLEX_BASE_URL": server.url})
    assert (result.exit_code, result.stdout) == (0, "tiny-llama heard: from a pipe\n")


@pytest.mark.parametrize("arguments", [["  "], []])
def test_an_empty_prompt_is_a_usage_error(server: FakeServer, arguments: list[str]) -> None:
    result = runner.invoke(chat_app, [*arguments, "--base-url", server.url], input="")
    assert result.exit_code == 2
    assert "the prompt is empty" in result.stderr
    assert server.seen == []


def test_no_server_is_one_clear_line(closed_url: str) -> None:
    result = runner.invoke(chat_app, ["hello", "--base-url", closed_url])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: no server answers at {closed_url}")
    assert "loraplex serve" in result.stderr


def test_an_error_in_mid_answer_ends_the_command(server: FakeServer) -> None:
    def fail_midway(handler: Handler, _seen: Seen) -> None:
        handler.start_events()
        handler.send_event(chat_chunk("half an"))
        handler.send_event({"error": {"message": "the engine stopped"}})
        handler.end_events()

    server.chat = fail_midway
    result = runner.invoke(chat_app, ["hello", "--model", "pirate", "--base-url", server.url])
    assert (result.exit_code, result.stdout) == (1, "half an\n")
    assert result.stderr == "error: the engine stopped\n"


def test_an_answer_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc\r\n\td \u200d\xa0é") == "a[2Jbc\n\td \u200d\xa0é"


# A conversation


@pytest.fixture
def talk(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Talk:
    monkeypatch.setattr(chat_module, "_stdin_is_a_terminal", lambda: True)
    return Talk(server)


class Talk:
    """Types lines into an interactive chat."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def __call__(self, *lines: str, model: str | None = "pirate", url: str | None = None) -> tuple[int, str, str]:
        arguments = ["--base-url", url or self.server.url, *(["--model", model] if model else [])]
        result = runner.invoke(chat_app, arguments, input="".join(f"{line}\n" for line in lines))
        return result.exit_code, result.stdout, result.stderr


def test_a_conversation_is_kept(talk: Talk) -> None:
    exit_code, stdout, stderr = talk("one", "two", "/quit", "never")
    assert exit_code == 0
    assert "Talking to pirate" in stdout
    assert "pirate heard: two" in stdout
    assert stderr.count("first token") == 2
    assert questions(talk.server)[-1].json["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "pirate heard: one"},
        {"role": "user", "content": "two"},
    ]


def test_the_base_answers_if_no_model_is_named_and_the_end_of_input_leaves(talk: Talk) -> None:
    exit_code, stdout, _ = talk("", "one", model=None)
    assert exit_code == 0
    assert "tiny-llama heard: one" in stdout
    assert len(questions(talk.server)) == 1


def test_commands_change_the_model_and_the_system_prompt(talk: Talk) -> None:
    exit_code, stdout, _ = talk(
        "/models", "one", "/model tiny-llama", "/system Rhyme.", "/clear", "two", "/system", "three"
    )
    assert exit_code == 0
    assert "  tiny-llama (base)\n* pirate\n" in stdout
    _, second, third = questions(talk.server)
    assert second.json["model"] == "tiny-llama"
    assert second.json["messages"] == [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "two"}]
    assert [message["role"] for message in third.json["messages"]] == ["user", "assistant", "user"]


def test_help_names_every_command(talk: Talk) -> None:
    _, stdout, _ = talk("/help")
    assert all(command in stdout for command in ("/model NAME", "/models", "/system TEXT", "/clear", "/help", "/quit"))


def test_wrong_commands_and_unknown_models_are_said_and_survived(talk: Talk) -> None:
    exit_code, stdout, stderr = talk("/dance", "/model", "/model nobody", "still here?")
    assert exit_code == 0
    assert "/dance is not a command" in stderr
    assert "/model is not a command, or needs a name" in stderr
    assert "there is no model named 'nobody'" in stderr
    assert "pirate heard: still here?" in stdout


def test_a_failed_question_is_taken_back(talk: Talk) -> None:
    def fail_once(handler: Handler, seen: Seen) -> None:
        talk.server.chat = stream_words
        handler.error(400, "too long")

    talk.server.chat = fail_once
    exit_code, _, stderr = talk("too much", "less")
    assert exit_code == 0
    assert "error: too long" in stderr
    assert questions(talk.server)[-1].json["messages"] == [{"role": "user", "content": "less"}]


def test_an_unknown_model_or_no_server_ends_the_command(talk: Talk, closed_url: str) -> None:
    exit_code, _, stderr = talk("one", model="nobody")
    assert (exit_code, stderr) == (1, "error: there is no model named 'nobody'\n")
    exit_code, _, stderr = talk("one", url=closed_url)
    assert exit_code == 1
    assert "no server answers" in stderr


def interrupted(server: FakeServer, left: threading.Event) -> None:
    """The next answer never ends, and Ctrl-C comes during it."""

    def stream(handler: Handler, _seen: Seen) -> None:
        server.chat = stream_words
        handler.start_events()
        handler.send_event(chat_chunk("Arr"))
        time.sleep(0.2)
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, signal.SIGINT)
        try:
            while not left.is_set():
                handler.send(b": waiting\n\n")
                time.sleep(0.005)
        except OSError:
            left.set()

    server.chat = stream


def test_ctrl_c_stops_the_answer_and_not_the_conversation(talk: Talk) -> None:
    left = threading.Event()
    interrupted(talk.server, left)
    exit_code, stdout, stderr = talk("one", "two")
    assert exit_code == 0
    assert left.wait(5)
    assert "stopped" in stderr
    assert "pirate heard: two" in stdout
    assert questions(talk.server)[-1].json["messages"][1] == {"role": "assistant", "content": "Arr"}


def test_ctrl_c_ends_a_single_question(server: FakeServer) -> None:
    left = threading.Event()
    interrupted(server, left)
    result = runner.invoke(chat_app, ["hello", "--base-url", server.url])
    assert (result.exit_code, result.stdout) == (130, "Arr\n")
    assert left.wait(5)


# Adapters


def adapters(server: FakeServer, *arguments: str, exit_code: int = 0) -> str:
    """Run `loraplex adapters ...`: stdout, or stderr if it is to fail."""
    result = runner.invoke(adapters_app, [*arguments, "--base-url", server.url])
    assert result.exit_code == exit_code, result.output
    return result.stderr if exit_code else result.stdout


def test_list(server: FakeServer) -> None:
    server.adapters["[bold]parrot"] = adapter_json("[bold]parrot", residency="disk", pinned=True, num_bytes=2_500_000)
    header, pirate, parrot = [line.split() for line in adapters(server, "list").splitlines() if line.strip("─ ")]
    assert header == ["name", "version", "rank", "size", "where", "pinned", "running", "waiting", "digest"]
    assert pirate == ["pirate", "2", "8", "8.2", "kB", "gpu", "1", "0", "a" * 12]
    assert parrot == ["[bold]parrot", "2", "8", "2.5", "MB", "disk", "yes", "1", "0", "a" * 12]


def test_an_empty_list_says_what_to_do(server: FakeServer) -> None:
    server.adapters.clear()
    assert "loraplex adapters upload" in adapters(server, "list")
    assert json.loads(adapters(server, "list", "--json")) == []


def test_show(server: FakeServer) -> None:
    text = adapters(server, "show", "pirate")
    for words in ("2 of 2", "4 to 8", "q_proj, v_proj", "4,096", "gpu", "1 running, 0 waiting", "sha256:" + "a" * 64):
        assert words in text


def test_json_is_the_servers_answer(server: FakeServer) -> None:
    assert json.loads(adapters(server, "show", "pirate", "--json")) == adapter_json()
    assert json.loads(adapters(server, "list", "--json")) == [adapter_json()]
    assert json.loads(adapters(server, "versions", "pirate", "--json")) == adapter_json()["versions"]
    assert json.loads(adapters(server, "delete", "pirate", "--json"))["freed_bytes"] == 8192


def test_upload(server: FakeServer, adapter_directory: Path) -> None:
    path = str(adapter_directory)
    assert "parrot is published as version 2" in adapters(server, "upload", path, "--name", "parrot", "--pin")
    assert server.adapters["parrot"]["pinned"] is True
    assert "taken by other content" in adapters(server, "upload", path, exit_code=1)
    assert "pirate is published" in adapters(server, "upload", path, "--replace")


def test_upload_of_nothing_is_a_usage_error(server: FakeServer, tmp_path: Path) -> None:
    assert "does not exist" in adapters(server, "upload", str(tmp_path / "nothing"), exit_code=2)
    assert "adapter_config.json" in adapters(server, "upload", str(tmp_path), exit_code=2)
    assert server.seen == []


def test_load(server: FakeServer) -> None:
    assert "parrot is published" in adapters(server, "load", "hf://org/parrot", "--name", "parrot")
    assert server.seen[-1].json["source"] == "hf://org/parrot"
    result = runner.invoke(adapters_app, ["load", "hf://org/parrot", "--base-url", server.url])
    assert result.exit_code == 2


def test_pin_and_unpin(server: FakeServer) -> None:
    assert "pirate is pinned" in adapters(server, "pin", "pirate")
    assert server.adapters["pirate"]["pinned"] is True
    assert "not pinned any more" in adapters(server, "unpin", "pirate")
    assert server.adapters["pirate"]["pinned"] is False


def test_versions(server: FakeServer) -> None:
    rows = [line.split() for line in adapters(server, "versions", "pirate").splitlines() if line.strip("─ ")]
    assert rows[0] == ["version", "current", "published", "source", "digest"]
    assert (rows[1][0], rows[1][-1]) == ("1", "b" * 12)
    assert (rows[2][:2], rows[2][-1]) == (["2", "yes"], "a" * 12)


def test_rollback_goes_one_version_back_or_to_the_one_named(server: FakeServer) -> None:
    assert "answers with version 1" in adapters(server, "rollback", "pirate")
    assert server.seen[-1].json == {"version": 1}
    assert "no version before" in adapters(server, "rollback", "pirate", exit_code=1)
    assert "answers with version 2" in adapters(server, "rollback", "pirate", "--to", "2")
    assert "has no version 7; it has 1, 2" in adapters(server, "rollback", "pirate", "--to", "7", exit_code=1)


def test_delete(server: FakeServer) -> None:
    assert "pirate is deleted, 8.2 kB freed" in adapters(server, "delete", "pirate")
    assert server.adapters == {}
    assert "there is no adapter named 'pirate'" in adapters(server, "delete", "pirate", exit_code=1)


def test_the_admin_key_comes_from_the_option_or_the_environment(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.admin_key = "secret"
    refusal = adapters(server, "list", exit_code=1)
    assert refusal.startswith("error: The admin key is missing or wrong. Give --api-key or --admin-key")
    assert "pirate" in adapters(server, "list", "--admin-key", "secret")
    monkeypatch.setenv("LORAPLEX_ADMIN_KEY", "secret")
    assert "pirate" in adapters(server, "list")


def test_every_command_has_an_example() -> None:
    commands = ["combine", "list", "show", "upload", "load", "delete", "pin", "unpin", "versions", "rollback"]
    assert sorted(commands) == sorted(
        command.name or str(getattr(command.callback, "__name__", "")) for command in adapters_app.registered_commands
    )
    for command in commands:
        result = runner.invoke(adapters_app, [command, "--help"])
        assert result.exit_code == 0
        assert f"Example: loraplex adapters {command}" in result.stdout
    assert "Example: loraplex chat" in runner.invoke(chat_app, ["--help"]).stdout


def test_a_row_that_is_piped_on_stays_on_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS")
    print_table(["name", "source"], [["a" * 60, "b" * 60]])
    assert any("a" * 60 in line and "b" * 60 in line for line in capsys.readouterr().out.splitlines())


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 8192, 2_500_000, 10**9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "8.2 kB",
        "2.5 MB",
        "1.0 GB",
    ]


def test_importing_the_commands_is_light() -> None:
    check = (
        "import sys, loraplex_server.commands.chat, loraplex_server.commands.adapters;"
        "print([m for m in ('httpx', 'pydantic', 'loraplex_client', 'torch', 'fastapi') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
