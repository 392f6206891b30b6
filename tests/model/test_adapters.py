"""Adapters added by segment give peft's logits, alone and mixed in one batch."""

from pathlib import Path

import pytest
import torch

from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.model.support import Pages, PeftFolders, Rows, random_tokens, run_alone, transformers_logits
from tests.models import FAMILIES, LINEARS, load_peft, make_adapter, make_checkpoint

KINDS = [
    (8, LINEARS),
    (3, ("q_proj", "v_proj")),
    (32, ("gate_proj", "down_proj")),
    (16, ("k_proj", "o_proj", "up_proj")),
]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    return load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")


@pytest.fixture(scope="module")
def folders(checkpoint: Path) -> list[Path]:
    return [
        make_adapter(checkpoint / f"adapter-{i}", checkpoint, rank=rank, targets=targets, seed=i, lora_alpha=2 * rank)
        for i, (rank, targets) in enumerate(KINDS)
    ]


def test_each_adapter_gives_the_logits_of_peft(checkpoint: Path, decoder: Decoder, folders: list[Path]) -> None:
    tokens = random_tokens(20)
    lookup = PeftFolders(decoder.spec, folders)
    base = run_alone(decoder, tokens)
    for slot, folder in enumerate(folders):
        found = run_alone(decoder, tokens, slot, lookup)
        wanted = transformers_logits(load_peft(checkpoint, folder), tokens)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        assert (found - base).abs().max() > 1e-2


def test_a_batch_of_all_adapters_answers_as_each_alone(decoder: Decoder, folders: list[Path]) -> None:
    lookup = PeftFolders(decoder.spec, folders)
    prompts = [random_tokens(5 + 7 * i, seed=i) for i in range(6)]
    slots = [-1, 0, 1, 2, 3, 3]
    pages = Pages(decoder)
    starts = [0, 0, len(prompts[2]) - 1, len(prompts[3]) - 1, 10, len(prompts[5]) - 1]
    rows = list(zip(prompts, starts, slots, strict=True))
    pages.logits([Rows(str(i), p, 0, start, slot) for i, (p, start, slot) in enumerate(rows) if start], lookup)
    mixed = pages.logits([Rows(str(i), p, start, len(p), slot) for i, (p, start, slot) in enumerate(rows)], lookup)
    for (prompt, start, slot), found in zip(rows, mixed, strict=True):
        torch.testing.assert_close(found, run_alone(decoder, prompt, slot, lookup)[start:], rtol=0, atol=1e-4)
