"""NF4: the values and logits are those of transformers with bitsandbytes, quantized on load or saved quantized."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loraplex_server.model.decoder import Decoder
from loraplex_server.model.errors import BadCheckpoint, UnsupportedModel
from loraplex_server.model.loader import load
from tests.model.support import random_tokens, run_alone, transformers_logits
from tests.models import FAMILIES, make_checkpoint

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def load_bnb(checkpoint: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(load_in_4bit=True, **{**options, **overrides})
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, quantization_config=config, device_map="cpu")


def assert_close(decoder: Decoder, model: Any, dtype: torch.dtype) -> None:
    tokens = random_tokens(40)
    found, wanted = run_alone(decoder, tokens), transformers_logits(model, tokens)
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_on_load(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, family, dtype=dtype)
    decoder = load(checkpoint, device="cpu", dtype=dtype)
    assert_close(decoder, load_bnb(checkpoint, dtype), dtype)


def test_biases_are_not_quantized(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    assert_close(load(checkpoint, device="cpu"), load_bnb(checkpoint), torch.float32)


def test_quantization_changes_the_logits(tmp_path: Path) -> None:
    checkpoint, tokens = make_checkpoint(tmp_path), random_tokens(8)
    quantized = run_alone(load(checkpoint, device="cpu", dtype=torch.float32), tokens)
    plain = run_alone(load(checkpoint, device="cpu", dtype=torch.float32, quantization="none"), tokens)
    assert (quantized - plain).abs().max() > 1e-2


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_by_bitsandbytes(family: str, double_quant: bool, tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "original", family)
    model = load_bnb(original, bnb_4bit_use_double_quant=double_quant)
    model.save_pretrained(tmp_path / "saved")
    assert_close(load(tmp_path / "saved", device="cpu", dtype=torch.float32), model, torch.float32)


def test_saved_with_some_linears_left_out(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "original")
    model = load_bnb(original, llm_int8_skip_modules=["lm_head", "model.layers.0.self_attn.k_proj"])
    model.save_pretrained(tmp_path / "saved")
    assert_close(load(tmp_path / "saved", device="cpu", dtype=torch.float32), model, torch.float32)


def test_saved_nf4_is_not_served_as_plain_weights(tmp_path: Path) -> None:
    load_bnb(make_checkpoint(tmp_path / "original")).save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedModel, match="stored as NF4"):
        load(tmp_path / "saved", device="cpu", quantization="none")


def test_saved_fp4_is_refused(tmp_path: Path) -> None:
    model = load_bnb(make_checkpoint(tmp_path / "original"), bnb_4bit_quant_type="fp4")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedModel, match="4-bit fp4"):
        load(tmp_path / "saved", device="cpu")


def test_saved_nf4_of_another_shape_is_refused(tmp_path: Path) -> None:
    load_bnb(make_checkpoint(tmp_path / "original")).save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 64'))
    with pytest.raises(BadCheckpoint, match=r"gate_proj\.weight has shape"):
        load(tmp_path / "saved", device="cpu")
