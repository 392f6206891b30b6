"""Settings: flags over environment over defaults, sizes as people write them, errors that name what to change."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.config import (
    ConfigError,
    ServeSettings,
    default_data_dir,
    env_of,
    flag_of,
    load_config,
)
from loraplex_server.sizes import parse_size

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "settings.md"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for setting in ServeSettings.model_fields:
        monkeypatch.delenv(env_of(setting), raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_a_model_is_enough(tmp_path: Path) -> None:
    config = load_config({"model": "org/name"})
    assert config.model.names == ("org/name",)
    assert config.http.host == "127.0.0.1"
    assert config.http.api_keys == ()
    assert config.adapters.data_dir == tmp_path / "data" / "loraplex" / "org--name"
    assert config.engine.kv_cache_bytes is None


def test_a_local_model_is_called_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    assert load_config({"model": str(tmp_path / "llama")}).model.names == ("llama",)


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_PORT", "9000")
    monkeypatch.setenv("LORAPLEX_MAX_RUNNING", "7")
    config = load_config({"model": "m", "port": 9001, "max_running": None})
    assert config.http.port == 9001
    assert config.engine.max_running == 7


def test_the_environment_holds_lists_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_MODEL", "m")
    monkeypatch.setenv("LORAPLEX_API_KEY", "one, two")
    monkeypatch.setenv("LORAPLEX_ADAPTER", "a=/x,b=hf://org/b@v1")
    monkeypatch.setenv("LORAPLEX_BLOCK_SIZE", "32")
    config = load_config({})
    assert config.http.api_keys == ("one", "two")
    assert config.adapters.preloaded == (("a", "/x"), ("b", "hf://org/b@v1"))
    assert config.engine.block_size == 32


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_ADMIN_KEY", "")
    monkeypatch.setenv("LORAPLEX_KV_CACHE_MEMORY", "")
    assert load_config({"model": "m"}).http.admin_keys == ()


@pytest.mark.parametrize("value", ["auto", None])
def test_auto_sizes_are_found_out_later(value: str | None) -> None:
    config = load_config({"model": "m", "kv_cache_memory": value, "max_model_len": value})
    assert config.engine.kv_cache_bytes is None
    assert config.model.max_model_len is None


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("2g", 2 << 30),
        ("1.5 GB", 1_500_000_000),
        ("64kB", 64_000),
        ("4096", 4096),
        ("17B", 17),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@given(st.text(max_size=12))
def test_a_size_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({}, r"--model \(or LORAPLEX_MODEL\) is required"),
        ({"model": "m", "device": "tpu"}, r"--device \(or LORAPLEX_DEVICE\).*'tpu'"),
        ({"model": "m", "port": 70000}, r"--port \(or LORAPLEX_PORT\)"),
        ({"model": "m", "kv_cache_memory": "lots"}, r"--kv-cache-memory .*'lots' is not a size"),
        ({"model": "m", "adapter": ["poet"]}, r"--adapter .*'poet' is not NAME=SOURCE"),
        ({"model": "m", "adapter": ["a=/x", "a=/y"]}, r"--adapter names 'a' twice"),
        ({"model": "m", "block_size": 24}, r"--block-size .*24 is not a power of two"),
        ({"model": "m", "max_running": 64, "max_batched_tokens": 32}, r"--max-batched-tokens .*--max-running"),
        ({"model": "m", "bogus": 1}, "there is no setting bogus"),
    ],
)
def test_errors_name_the_flag_and_the_variable(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(given_settings)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        load_config({"model": "m", "port": -1, "dtype": "int3"})
    assert "--port" in str(raised.value)
    assert "--dtype" in str(raised.value)


def test_keys_are_not_shown() -> None:
    config = load_config({"model": "m", "api_key": ["hush-user"], "admin_key": ["hush-admin"]})
    assert "hush" not in repr(config)
    with pytest.raises(ConfigError) as raised:
        load_config({"model": "m", "api_key": ["hush-ü"]})
    assert "hush" not in str(raised.value)


def test_data_directories_of_two_bases_differ() -> None:
    assert default_data_dir("org/a") != default_data_dir("org/b")
    assert default_data_dir("../x").name == default_data_dir("../x").name.strip("./")


def test_every_setting_is_documented() -> None:
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| `(LORAPLEX_[A-Z_]+)` \|", PAGE.read_text(encoding="utf-8"), re.M))
    assert rows == {flag_of(setting): env_of(setting) for setting in ServeSettings.model_fields}


def test_documented_help_is_the_help() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for setting, field in ServeSettings.model_fields.items():
        assert field.description, setting
        assert field.description in page, (
            f"docs/reference/settings.md does not say of {flag_of(setting)} what --help says"
        )
