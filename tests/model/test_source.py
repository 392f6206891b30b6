"""Hub ids: what is asked of the Hub, and what its refusals become."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from loraplex_server.model.errors import ModelNotFound
from loraplex_server.model.source import resolve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The downloads that were asked for; each gives an empty folder."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_folder_needs_no_hub(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert asked == []


def test_a_hub_id_is_downloaded_at_its_revision(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    assert resolve("owner/name", revision="v1", token="secret") == tmp_path
    assert (asked[0]["repo_id"], asked[0]["revision"], asked[0]["token"]) == ("owner/name", "v1", "secret")


def test_only_safetensors_configs_and_tokenizers_are_asked_for(asked: list[dict[str, Any]]) -> None:
    resolve("owner/name")
    patterns = asked[0]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert "tokenizer.json" in patterns
    assert not [p for p in patterns if p.endswith((".py", ".bin", ".pt", ".pkl")) or p == "*"]


def test_a_dummy_leaves_the_weights_where_they_are(asked: list[dict[str, Any]]) -> None:
    resolve("owner/name", weights=False)
    assert "*.safetensors" not in asked[0]["allow_patterns"]


def test_the_hub_s_refusal_names_model_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection, and nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFound, match=r"owner/name at revision v1: no connection"):
        resolve("owner/name", revision="v1")
