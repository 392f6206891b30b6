"""The load generator as a command: against a scripted server, and on a server of its own."""

import asyncio
import csv
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from loraplex_client.load.plan import WORDS
from loraplex_server.bench.serve import NoSuchServer, listed_models
from loraplex_server.bench.tokenizer import write_tokenizer
from loraplex_server.cli import app
from loraplex_server.tokenizer import Tokenizer
from tests.client.load.scripted import Exchange, scripted_server


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


async def two_words(exchange: Exchange) -> None:
    if exchange.body["model"] == "full":
        return await exchange.refuse(429, "queue_full")
    await exchange.begin()
    await asyncio.sleep(0.01)
    await exchange.text()
    await exchange.text()
    return await exchange.end(output_tokens=2)


def test_a_running_server_is_loaded_at_every_level(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with scripted_server(two_words) as server:
        done = bench(
            *("--url", server.url, "--models", "good,full", "--concurrency", "1,2", "--num-requests", "4x"),
            *("--processes", "1", "--slo", "first=5000,token=5000", "--out", str(tmp_path)),
        )
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "serve.csv")
    assert [(row["concurrency"], row["requests"], row["ok"], row["errors"]) for row in rows] == [
        ("1", "4", "2", "queue_full:2"),
        ("2", "8", "4", "queue_full:4"),
    ]
    assert all(10 <= float(row["first_token_ms_p50"]) < 1000 for row in rows)
    assert all(float(row["within_slo"]) == 0.5 for row in rows)
    by_model = rows_of(tmp_path / "serve_by_model.csv")
    assert [(row["model"], row["ok"]) for row in by_model] == [
        ("full", "0"),
        ("good", "2"),
        ("full", "0"),
        ("good", "4"),
    ]
    assert (tmp_path / "serve.png").exists()


def test_an_open_loop_says_its_rate(tmp_path: Path) -> None:
    with scripted_server(two_words) as server:
        done = bench(
            *("--url", server.url, "--models", "good", "--rate", "40", "--num-requests", "8", "--processes", "1"),
            *("--warmup", "0", "--out", str(tmp_path)),
        )
    assert done.exit_code == 0, done.output
    (row,) = rows_of(tmp_path / "serve.csv")
    assert (row["rate"], row["concurrency"], row["ok"]) == ("40.0", "", "8")
    assert float(row["late_ms_p99"]) < 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "localhost:1", "--models", "m"), "no address"),
        (("--url", "http://127.0.0.1:9", "--models", "m", "--mix", "zipf"), "no mix"),
        (("--url", "http://127.0.0.1:9", "--models", "m", "--slo", "speed=3"), "--slo does not know"),
        (("--url", "http://127.0.0.1:9", "--models", "m", "--peers", "transformers"), "leave --url out"),
        (("--url", "http://127.0.0.1:9", "--models", "m", "--rate", "5", "--num-requests", "2x"), "--rate has none"),
        (("--url", "http://127.0.0.1:9", "--models", "m", "--prompt-tokens", "some"), "no length"),
    ],
)
def test_mistakes_end_the_command_with_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_nobody_at_the_address(tmp_path: Path) -> None:
    done = bench("--url", "http://127.0.0.1:9", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "does not list its models" in done.output


def test_models_are_those_that_the_server_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(url: str, *, headers: dict[str, str], timeout: float) -> httpx.Response:
        assert (url, headers) == ("http://host/v1/models", {"authorization": "Bearer key"})
        return httpx.Response(200, json={"data": cards}, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    cards = [{"id": "base"}, {"id": "sql"}]
    assert listed_models("http://host/v1/", "key") == ("base", "sql")
    cards = []
    with pytest.raises(NoSuchServer, match="no model"):
        listed_models("http://host", "key")


@pytest.mark.e2e
def test_a_server_of_its_own(tmp_path: Path) -> None:
    done = bench(
        *("--shape", "tiny", "--device", "cpu", "--adapters", "2", "--concurrency", "2", "--num-requests", "4"),
        *("--prompt-tokens", "uniform:3:6", "--output-tokens", "5", "--processes", "1", "--warmup", "0"),
        *("--peers", "transformers", "--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    ours, theirs = rows_of(tmp_path / "serve_tiny.csv")
    assert (ours["ok"], ours["errors"], ours["output_tokens"]) == ("4", "", "20")
    assert float(ours["start_s"]) > 0
    assert float(theirs["ratio"]) > 0


@pytest.mark.e2e
def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    done = bench(
        *("--shape", "tiny", "--device", "cpu", "--adapters", "0", "--num-requests", "1", "--out", str(tmp_path)),
        *("--serve-flags", "--max-model-len 100000"),
    )
    assert done.exit_code == 1
    assert "did not start" in done.output
    assert "--max-model-len" in done.output


@pytest.mark.parametrize("vocab_size", [1024, 5000])
def test_the_tokenizer_has_a_text_for_every_id(tmp_path: Path, vocab_size: int) -> None:
    write_tokenizer(tmp_path, vocab_size)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == vocab_size
    detokenizer = tokenizer.detokenizer()
    assert all(detokenizer.push_token(token) for token in range(256, vocab_size))
    text = " ".join(WORDS)
    ids = tokenizer.encode(text)
    assert detokenizer.push(ids) + detokenizer.flush() == text
    if vocab_size == 5000:
        assert len(ids) == len(WORDS)
    assert tokenizer.render_chat([{"role": "user", "content": "the man"}], {}) == "the man"
