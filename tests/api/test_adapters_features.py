"""Adapters with more than low-rank updates, uploaded to a running server: shown with their features, and served exactly."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from loraplex_server.model.loader import load
from tests.api.live import live_server, zipped
from tests.api.servers import Server
from tests.features import PeftAnswers, make_feature
from tests.models import make_checkpoint

PROMPT = [84, 7, 101, 100, 9, 32, 81]
FEATURES = {
    "everything": ["rslora", "dora", "modules_to_save", "trainable_tokens"],
    "added-tokens": ["modules_to_save"],
    "embeddings-and-head": ["embedding_lora", "head_lora", "modules_to_save"],
    "lora-bias": ["lora_bias"],
    "lora": [],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_feature(root / name, checkpoint, name, seed) for seed, name in enumerate(FEATURES)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, folders: dict[str, Path]) -> Iterator[Server]:
    decoder = load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
    with live_server(tmp_path_factory.mktemp("live"), decoder) as server, server.http() as http:
        for name, folder in folders.items():
            files = {"file": (f"{name}.zip", zipped(folder))}
            assert http.post("/v1/adapters", data={"name": name}, files=files).status_code == 201
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def complete(http: httpx.Client, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 5, "ignore_eos": True}
    response = http.post("/v1/completions", json={**body, "return_tokens_as_token_ids": True})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


@pytest.mark.parametrize("name", FEATURES)
def test_the_answer_is_that_of_peft(http: httpx.Client, checkpoint: Path, folders: dict[str, Path], name: str) -> None:
    tokens, scores = PeftAnswers(checkpoint, folders[name], name).greedy(PROMPT, 4)
    # A second time from the prefix cache, which knows the adapter.
    for _ in range(2):
        logprobs = complete(http, name)["logprobs"]
        assert [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]] == tokens
        for position, top in enumerate(logprobs["top_logprobs"]):
            for token, logprob in top.items():
                expected = scores[position, int(token.removeprefix("token_id:"))].item()
                assert math.isclose(logprob, expected, abs_tol=1e-4)


@pytest.mark.parametrize(("name", "features"), FEATURES.items())
def test_the_features_are_shown(http: httpx.Client, name: str, features: list[str]) -> None:
    shown = http.get(f"/v1/adapters/{name}").json()
    assert shown["features"] == features
    assert shown["num_bytes"] > 0
