"""Whatever peft's LoRA can train answers as peft does, alone and beside all other features in one batch."""

from pathlib import Path

import pytest
import torch

from tests.features import features_of
from tests.models import FAMILIES
from tests.parity import TOLERANCE, measure, read_table

# A CPU's bfloat16 strays by 0.016 from float32 here.
BFLOAT16_TOLERANCE = 0.05

# What is measured again here; the whole table takes minutes.
FRESH = [
    pytest.param("llama", False, None, id="llama-float32"),
    pytest.param(
        "qwen2", False, ("dora-bias-all", "bias-lora-only", "whole-tied", "lora-tied", "tokens"), id="qwen2-tied"
    ),
    pytest.param("qwen3", True, ("everything", "dora", "embeddings-dora", "added-and-trained"), id="qwen3-nf4"),
]


@pytest.mark.parametrize(("family", "nf4", "features"), FRESH)
def test_features_answer_as_peft(tmp_path: Path, family: str, nf4: bool, features: tuple[str, ...] | None) -> None:
    for row in measure(family, tmp_path, nf4=nf4, features=features):
        assert row.is_exact, row
        assert row.effect > 100 * TOLERANCE, f"{row.feature} changes nothing that could be told"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_features_answer_as_peft_on_a_gpu(tmp_path: Path, family: str) -> None:
    wrong = [row for row in measure(family, tmp_path, device="cuda") if not row.is_exact]
    assert not wrong, wrong


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_features_over_packed_nf4_stray_no_further_than_rounding(tmp_path: Path) -> None:
    rows = measure("llama", tmp_path, nf4=True, device="cuda", dtype=torch.bfloat16)
    wrong = [row for row in rows if row.difference_alone > BFLOAT16_TOLERANCE]
    assert not wrong, wrong


def test_the_committed_table_covers_every_feature_and_all_of_it_is_exact() -> None:
    table = read_table()
    covered = {(row["family"], row["base"], row["feature"]) for row in table}
    assert covered == {(f, base, name) for f in FAMILIES for base in ("float32", "nf4") for name in features_of(f)}
    for row in table:
        assert row["tokens_equal_alone"] == row["tokens_equal_mixed"] == "True", row
        assert float(row["difference_alone"]) <= TOLERANCE, row
        assert float(row["difference_mixed"]) <= TOLERANCE, row
        assert float(row["effect"]) > 100 * TOLERANCE, row
