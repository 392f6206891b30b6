"""What a config.json says, and what of it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.model.errors import BadCheckpoint, ModelNotFound, UnsupportedModel
from loraplex_server.model.spec import ModelSpec
from tests.models import FAMILIES, make_config


def spec_of(family: str, **overrides: Any) -> ModelSpec:
    return ModelSpec.from_config(make_config(family, **overrides).to_dict())


def test_families_differ_in_biases_and_norms() -> None:
    specs = {family: spec_of(family) for family in FAMILIES}
    assert [family for family in FAMILIES if specs[family].qkv_bias] == ["qwen2"]
    assert [family for family in FAMILIES if specs[family].qk_norm] == ["qwen3"]
    assert not any(spec.o_bias or spec.mlp_bias for spec in specs.values())


def test_head_size_is_derived_or_explicit() -> None:
    assert spec_of("llama").head_dim == 16
    assert spec_of("qwen3", head_dim=48).linears["q_proj"] == (4 * 48, 64)


def test_shapes_of_linears_are_rows_then_columns() -> None:
    linears = spec_of("llama").linears
    assert linears["k_proj"] == (32, 64)
    assert linears["o_proj"] == (64, 64)
    assert linears["down_proj"] == (64, 128)


def test_windows_follow_each_family_s_rule() -> None:
    window = {"sliding_window": 8}
    assert spec_of("llama", **window).windows == (None, None)
    assert spec_of("mistral", **window).windows == (8, 8)
    assert spec_of("mistral", sliding_window=None).windows == (None, None)
    assert spec_of("qwen2", **window).windows == (None, None)
    assert spec_of("qwen2", use_sliding_window=True, max_window_layers=1, **window).windows == (None, 8)


def test_end_of_text_comes_from_the_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config("llama").to_dict()))
    assert ModelSpec.from_folder(tmp_path).eos_token_ids == (257,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    assert ModelSpec.from_folder(tmp_path).eos_token_ids == (257, 258)


def test_yarn_extends_the_context() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    assert spec_of("qwen2", rope_parameters=rope).context_length == 2048
    assert spec_of("qwen2").context_length == 512


def test_the_digest_follows_the_mathematics_alone() -> None:
    digest = spec_of("llama").maths_digest()
    assert spec_of("llama", eos_token_id=1).maths_digest() == digest
    assert spec_of("llama", rms_norm_eps=1e-6).maths_digest() != digest
    assert spec_of("llama", rope_theta=5e5).maths_digest() != digest
    assert spec_of("mistral", head_dim=16).maths_digest() != digest


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "llama4", None])
def test_other_families_are_refused_with_the_list_of_ours(model_type: str | None) -> None:
    with pytest.raises(UnsupportedModel, match="supported: llama, mistral, qwen2, qwen3"):
        ModelSpec.from_config({"model_type": model_type})


def test_code_beside_a_config_is_never_run() -> None:
    raw = {"model_type": "custom", "auto_map": {"AutoConfig": "configuration_custom.CustomConfig"}}
    with pytest.raises(UnsupportedModel, match="'custom'"):
        ModelSpec.from_config(raw)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "factor": 2.0,
                    "original_max_position_embeddings": 256,
                }
            },
            "rope type 'longrope'",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "part of"),
    ],
)
def test_features_that_are_not_served_are_refused(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        spec_of("llama", **overrides)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(BadCheckpoint, match="num_key_value_heads"):
        spec_of("llama", num_key_value_heads=3)


def test_values_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(BadCheckpoint, match=r"refuses this config\.json"):
        ModelSpec.from_config({"model_type": "llama", "hidden_size": "many"})


def test_a_folder_without_a_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        ModelSpec.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(BadCheckpoint, match="is not JSON"):
        ModelSpec.from_folder(tmp_path)
