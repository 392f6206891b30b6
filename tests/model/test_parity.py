"""Logits equal transformers' on the same checkpoint, for every family and every feature its config can turn on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex_server.model.loader import load
from tests.model.support import Pages, Rows, random_tokens, run_alone, transformers_logits
from tests.models import FAMILIES, make_checkpoint

NUM_TOKENS = 45

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}

FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 48}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1}),
    "llama-rope-llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama-rope-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-rope-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-old-rope-scaling": ("llama", {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "qwen3-window": ("qwen3", {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 7}),
}  # fmt: skip


@pytest.fixture(scope="module", params=FEATURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = FEATURES[request.param]
    return make_checkpoint(tmp_path_factory.mktemp(request.param), family, **overrides)


def test_unquantized_logits_are_those_of_transformers(checkpoint: Path) -> None:
    decoder = load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = random_tokens(NUM_TOKENS)
    torch.testing.assert_close(run_alone(decoder, tokens), transformers_logits(model, tokens), rtol=0, atol=1e-4)


def test_chunks_and_single_tokens_give_what_the_whole_prompt_gives(checkpoint: Path) -> None:
    decoder = load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
    tokens = random_tokens(NUM_TOKENS)
    whole = run_alone(decoder, tokens)
    for step in (1, 5, 16):
        pages = Pages(decoder)
        bounds = [(start, min(start + step, NUM_TOKENS)) for start in range(0, NUM_TOKENS, step)]
        found = torch.cat([pages.logits([Rows("chunked", tokens, *bound)])[0] for bound in bounds])
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)


def test_a_mixed_batch_answers_as_each_sequence_alone(checkpoint: Path) -> None:
    decoder = load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
    lengths = {"a": 3, "b": 40, "c": 17, "d": 18, "e": 9, "f": 33}
    prompts = {name: random_tokens(length, seed) for seed, (name, length) in enumerate(lengths.items())}
    # Before the step under test, e and f have a part of their prompt and the others all but one token.
    known = {name: length - 1 for name, length in lengths.items()} | {"e": 0, "f": 12}
    pages = Pages(decoder)
    pages.logits([Rows(name, prompts[name], 0, known[name]) for name in lengths if known[name]])
    mixed = pages.logits([Rows(name, prompts[name], known[name], lengths[name]) for name in lengths])
    for name, found in zip(lengths, mixed, strict=True):
        alone = run_alone(decoder, prompts[name])[known[name] :]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)
