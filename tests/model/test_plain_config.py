"""A config read without transformers means what transformers reads in it, or is left to it."""

import subprocess
import sys
from typing import Any

import pytest

from loraplex_server.model import spec
from loraplex_server.model.plain_config import plain_config
from loraplex_server.model.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": [1, 2],
    "rope_theta": 500000.0, "rope_scaling": None,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
    "rope_type": "llama3",
}  # fmt: skip


def without(name: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (LLAMA | changes).items() if key != name}


def with_parameters(**parameters: Any) -> dict[str, Any]:
    raw = without("rope_theta", rope_parameters=parameters)
    del raw["rope_scaling"]
    return raw


PLAIN = [
    LLAMA,
    LLAMA | {"rope_scaling": LLAMA3},
    LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}, "head_dim": 64},
    LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_theta": 10000},
    with_parameters(rope_type="default", rope_theta=1000000.0),
    with_parameters(rope_theta=500000.0, **LLAMA3),
    LLAMA | {"model_type": "mistral", "sliding_window": 64},
    LLAMA | {"model_type": "mistral", "sliding_window": None, "head_dim": 128},
    LLAMA | {"model_type": "qwen2", "eos_token_id": 7},
    LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2},
    LLAMA | {"model_type": "qwen3", "head_dim": 128},
]

LEFT_OPEN = [
    without("num_key_value_heads"),
    without("tie_word_embeddings"),
    without("eos_token_id"),
    without("rope_theta"),
    without("rms_norm_eps"),
    LLAMA | {"hidden_act": "gelu"},
    LLAMA | {"hidden_size": "many"},
    LLAMA | {"num_attention_heads": 7},
    LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    LLAMA | {"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}},
    LLAMA | {"model_type": "mistral"},
    LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
    LLAMA | {"model_type": "qwen2", "layer_types": ["full_attention"] * 4},
    LLAMA | {"model_type": "qwen3"},
]


@pytest.mark.parametrize("raw", PLAIN)
def test_both_readings_agree(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain_config(raw) is not None
    plain = ModelSpec.from_config(dict(raw))
    monkeypatch.setattr(spec, "plain_config", lambda raw: None)
    assert ModelSpec.from_config(dict(raw)) == plain


@pytest.mark.parametrize("raw", LEFT_OPEN)
def test_what_is_left_open_is_left_to_transformers(raw: dict[str, Any]) -> None:
    assert plain_config(raw) is None


def test_reading_a_plain_config_imports_no_transformers() -> None:
    code = (
        "import sys; from loraplex_server.model.spec import ModelSpec; "
        f"ModelSpec.from_config({PLAIN[1]!r}); print(*(m in sys.modules for m in ('transformers', 'bitsandbytes')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
