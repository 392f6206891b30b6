"""What peft saves is read exactly; what cannot be served is refused with a reason."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_adapters import format as adapter_format
from loraplex_adapters.base import BaseShape
from loraplex_adapters.errors import AdapterError, InvalidAdapter, UnsupportedAdapter, WrongBase
from tests.adapters.making import (
    CONFIG,
    HIDDEN,
    KV,
    WEIGHTS,
    edit_config,
    edit_tensors,
    random_weights,
    save_random,
    save_with_peft,
    tensor_name,
)

PEFT_ADAPTERS: dict[str, dict[str, Any]] = {
    "all linears": {"r": 4, "lora_alpha": 9, "target_modules": "all-linear"},
    "two linears": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rank above every dimension": {"r": 64, "lora_alpha": 16, "target_modules": ["k_proj"]},
    "rslora": {"r": 9, "lora_alpha": 16, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]},
    "rank pattern": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
    },
    "alpha pattern": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "q_proj": 3, "layers.[12].mlp.up_proj": 5},
    },
    "patterns and rslora": {
        "r": 4,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {r".*\.(gate|up)_proj": 6},
        "alpha_pattern": {r"model\.layers\.\d+\.mlp\..*": 32},
    },
    "layers to transform": {"r": 2, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "target regex": {"r": 2, "target_modules": r".*layers\.[01]\.self_attn\.(q|k)_proj"},
    "full paths": {"r": 2, "target_modules": ["model.layers.1.mlp.up_proj", "layers.2.self_attn.o_proj"]},
    "excluded": {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "gaussian start": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal start": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("lora", PEFT_ADAPTERS.values(), ids=PEFT_ADAPTERS.keys())
def test_deltas_are_those_of_peft(folder: Path, base: BaseShape, lora: dict[str, Any]) -> None:
    expected = save_with_peft(folder, **lora)

    weights = adapter_format.read(folder, base)

    assert weights.factors.keys() == expected.keys()
    for module, factors in weights.factors.items():
        torch.testing.assert_close(factors.scaling * factors.b @ factors.a, expected[module])
    assert weights.num_parameters == sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    assert weights.num_bytes == 4 * weights.num_parameters


@pytest.mark.parametrize("lora", PEFT_ADAPTERS.values(), ids=PEFT_ADAPTERS.keys())
def test_write_is_the_inverse_of_read(folder: Path, tmp_path: Path, base: BaseShape, lora: dict[str, Any]) -> None:
    save_with_peft(folder, **lora)
    weights = adapter_format.read(folder, base)

    adapter_format.write(tmp_path / "again", weights)
    again = adapter_format.read(tmp_path / "again", base)

    assert again.ranks == weights.ranks
    for module, factors in weights.factors.items():
        assert torch.equal(again.factors[module].a, factors.a)
        assert torch.equal(again.factors[module].b, factors.b)
        assert math.isclose(again.factors[module].scaling, factors.scaling, rel_tol=1e-15)


def test_peft_reads_what_write_wrote(folder: Path, base: BaseShape) -> None:
    from peft import LoraConfig

    adapter_format.write(folder, random_weights(rank=3, scaling=0.75))

    config = LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha) == (3, 2.25)


@pytest.mark.parametrize(
    "respell",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
        lambda name: name.removeprefix("base_model.model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."),
        lambda name: f"module.{name}",
    ],
    ids=["adapter name", "no prefix", "bare decoder", "bare layers", "compiled", "FSDP", "data parallel"],
)
def test_older_and_newer_spellings_are_read(folder: Path, base: BaseShape, respell: Any) -> None:
    save_random(folder)
    expected = adapter_format.read(folder, base)
    save_file({respell(name): t.clone() for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    weights = adapter_format.read(folder, base)

    assert all(torch.equal(weights.factors[m].a, expected.factors[m].a) for m in expected.factors)


@pytest.mark.parametrize(
    ("dtype", "read_as"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.bfloat16),
    ],
)
def test_narrow_floats_are_read_exactly(
    folder: Path, base: BaseShape, dtype: torch.dtype, read_as: torch.dtype
) -> None:
    save_random(folder)
    narrow = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(narrow, folder / WEIGHTS)

    factors = adapter_format.read(folder, base).factors[0, "q_proj"]

    assert factors.a.dtype == read_as
    assert torch.equal(factors.a.float(), narrow[tensor_name(0, "q_proj", "A")].float())


def test_tensors_are_mapped_not_copied(folder: Path, base: BaseShape) -> None:
    save_random(folder)
    weights = adapter_format.read(folder, base)

    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(WEIGHTS)]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    pointer = weights.factors[0, "q_proj"].a.data_ptr()
    assert any(low <= pointer < high for low, high in spans)


CONFIG_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "megatron": ({"megatron_config": {"x": 1}}, "megatron"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "alora"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "bare parameters": ({"target_parameters": ["experts.w"]}, "target_parameters"),
    "QALoRA": ({"use_qalora": True}, "qalora"),
    "block diagonal": ({"use_bdlora": {"nblocks": 2}}, "bdlora"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa"),
    "MonteCLoRA": ({"monteclora_config": {"x": 1}}, "monteclora"),
    "IA3": ({"peft_type": "IA3"}, "peft_type"),
    "no peft_type": ({"peft_type": None}, "peft_type"),
    "classifier": ({"task_type": "SEQ_CLS"}, "task_type"),
    "task of a strange type": ({"task_type": [1]}, "task_type"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_changes_base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_changes_base"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_changes_base"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_changes_base"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_changes_base"),
    "unknown start": ({"init_lora_weights": "new"}, "unknown_init"),
    "start of a strange type": ({"init_lora_weights": {"a": 1}}, "unknown_init"),
    "unknown key": ({"use_new_maths": 2}, "unknown_config_key"),
    "alpha pattern beyond us": ({"alpha_pattern": {"(a+)+$": 3}}, "pattern_unsupported"),
    "alpha pattern too long": ({"alpha_pattern": {"q" * 300: 3}}, "pattern_unsupported"),
}


@pytest.mark.parametrize(("changes", "code"), CONFIG_REFUSALS.values(), ids=CONFIG_REFUSALS.keys())
def test_unserved_features_are_named(folder: Path, base: BaseShape, changes: dict[str, Any], code: str) -> None:
    edit_config(save_random(folder), **changes)

    with pytest.raises(UnsupportedAdapter) as refusal:
        adapter_format.read(folder, base)

    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("VERA", "random matrices"), ("XLORA", "gate"), ("PROMPT_TUNING", "no tokens"), ("IA3", "scales")],
)
def test_other_methods_are_refused_by_name(folder: Path, base: BaseShape, kind: str, reason: str) -> None:
    edit_config(save_random(folder), peft_type=kind)

    with pytest.raises(UnsupportedAdapter, match=reason):
        adapter_format.read(folder, base)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"r": 0}, "adapter_config_invalid"),
        ({"r": -1}, "adapter_config_invalid"),
        ({"r": True}, "adapter_config_invalid"),
        ({"r": "8"}, "adapter_config_invalid"),
        ({"r": 10**30}, "adapter_config_invalid"),
        ({"lora_alpha": "16"}, "adapter_config_invalid"),
        ({"lora_alpha": 10**400}, "adapter_config_invalid"),
        ({"use_rslora": "no"}, "adapter_config_invalid"),
        ({"rank_pattern": [1]}, "adapter_config_invalid"),
        ({"rank_pattern": {"q_proj": 0}}, "adapter_config_invalid"),
        ({"alpha_pattern": {"q_proj": None}}, "adapter_config_invalid"),
        ({"target_modules": [1]}, "adapter_config_invalid"),
        ({"layers_to_transform": ["0"]}, "adapter_config_invalid"),
        ({"layers_pattern": "blocks"}, "adapter_config_invalid"),
        ({"bias": "some"}, "adapter_config_invalid"),
        ({"modules_to_save": "lm_head"}, "adapter_config_invalid"),
        ({"modules_to_save": [""]}, "adapter_config_invalid"),
        ({"trainable_token_indices": [1, 1]}, "adapter_config_invalid"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "adapter_config_invalid"),
        ({"trainable_token_indices": [-1]}, "adapter_config_invalid"),
        ({"use_dora": True, "lora_bias": True}, "adapter_config_invalid"),
        ({"use_dora": True}, "tensors_missing"),
        ({"lora_bias": True}, "tensors_missing"),
        ({"modules_to_save": ["lm_head"]}, "tensors_missing"),
        ({"trainable_token_indices": [1, 2]}, "tensors_missing"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "tensors_missing"),
        ({"r": 3}, "rank_mismatch"),
        ({"rank_pattern": {"q_proj": 5}}, "rank_mismatch"),
        ({"target_modules": ["q_proj"]}, "not_targeted"),
        ({"layers_to_transform": [0, 1]}, "not_targeted"),
    ],
    ids=str,
)
def test_inconsistent_configs_are_refused(folder: Path, base: BaseShape, changes: dict[str, Any], code: str) -> None:
    edit_config(save_random(folder), **changes)

    with pytest.raises(InvalidAdapter) as refusal:
        adapter_format.read(folder, base)

    assert refusal.value.code == code


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1, "peft_version": "0.99", "revision": "main", "qalora_group_size": 16},
        {"auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}},
        {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"a_later_feature_left_off": None, "another": False, "a_third": {}},
        {"target_modules": "(((a+)+)+)+$", "layers_to_transform": None},
        {"rank_pattern": {"(a+)+$": 3}},
    ],
    ids=str,
)
def test_what_does_not_change_the_maths_is_accepted(folder: Path, base: BaseShape, changes: dict[str, Any]) -> None:
    edit_config(save_random(folder), **changes)

    assert adapter_format.read(folder, base).max_rank == 2


@pytest.mark.parametrize(
    ("name", "error", "code"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", InvalidAdapter, "shape_mismatch"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", InvalidAdapter, "factor_missing"),
        ("base_model.model.model.embed_tokens.lora_A.weight", InvalidAdapter, "unknown_module"),
        ("base_model.model.lm_head.lora_A.weight", InvalidAdapter, "factor_missing"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", InvalidAdapter, "shape_mismatch"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", InvalidAdapter, "not_targeted"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", UnsupportedAdapter, "modules_to_save"),
        ("base_model.model.model.layers.0.self_attn.q_proj.weight", UnsupportedAdapter, "modules_to_save"),
        ("base_model.model.model.layers.0.input_layernorm.weight", InvalidAdapter, "not_targeted"),
        ("base_model.model.model.embed_tokens.trainable_tokens_delta", InvalidAdapter, "not_targeted"),
        ("base_model.model.score.weight", InvalidAdapter, "unknown_module"),
        ("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", InvalidAdapter, "unknown_module"),
        ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", InvalidAdapter, "unknown_module"),
        ("x.model.layers.0.self_attn.q_proj.lora_A.weight", InvalidAdapter, "unknown_module"),
        ("nonsense", InvalidAdapter, "unknown_module"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.second.weight", InvalidAdapter, "duplicate_tensor"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", InvalidAdapter, "factor_missing"),
    ],
)
def test_no_tensor_is_dropped(folder: Path, base: BaseShape, name: str, error: type[AdapterError], code: str) -> None:
    edit_tensors(save_random(folder), {name: torch.zeros(2, HIDDEN)})

    with pytest.raises(error) as refusal:
        adapter_format.read(folder, base)

    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("a", "b", "error", "code"),
    [
        (torch.zeros(2, HIDDEN), torch.zeros(HIDDEN, 3), InvalidAdapter, "shape_mismatch"),
        (torch.zeros(HIDDEN), torch.zeros(HIDDEN, 2), InvalidAdapter, "shape_mismatch"),
        (torch.zeros(0, HIDDEN), torch.zeros(HIDDEN, 0), InvalidAdapter, "shape_mismatch"),
        (torch.zeros(2, HIDDEN + 1), torch.zeros(HIDDEN, 2), WrongBase, "shape_mismatch"),
        (torch.zeros(2, HIDDEN), torch.zeros(KV, 2), WrongBase, "shape_mismatch"),
        (None, torch.zeros(HIDDEN, 2), InvalidAdapter, "factor_missing"),
        (torch.zeros(2, HIDDEN), None, InvalidAdapter, "factor_missing"),
        (None, None, InvalidAdapter, "tensors_missing"),
        (torch.full((2, HIDDEN), math.nan), torch.zeros(HIDDEN, 2), InvalidAdapter, "not_finite"),
        (torch.zeros(2, HIDDEN), torch.full((HIDDEN, 2), math.inf), InvalidAdapter, "not_finite"),
        (torch.zeros(2, HIDDEN).double(), torch.zeros(HIDDEN, 2), UnsupportedAdapter, "dtype_unsupported"),
        (torch.zeros(2, HIDDEN).long(), torch.zeros(HIDDEN, 2), UnsupportedAdapter, "dtype_unsupported"),
    ],
)
def test_damaged_factors_are_refused(
    folder: Path,
    base: BaseShape,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    error: type[AdapterError],
    code: str,
) -> None:
    edit_tensors(save_random(folder), {tensor_name(0, "q_proj", "A"): a, tensor_name(0, "q_proj", "B"): b})

    with pytest.raises(error) as refusal:
        adapter_format.read(folder, base)

    assert refusal.value.code == code


def test_more_layers_than_the_base_is_a_wrong_base(folder: Path, base: BaseShape) -> None:
    save_random(folder)
    shorter = BaseShape("llama", 2, base.linears, base.vocab_size, base.hidden_size, "0" * 64)

    with pytest.raises(WrongBase):
        adapter_format.read(folder, shorter)


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "adapter_config_missing"),
        ({WEIGHTS: b""}, "adapter_config_missing"),
        ({CONFIG: b"{}"}, "adapter_weights_missing"),
        ({CONFIG: b"{}", "adapter_model.bin": b"x"}, "pickle_refused"),
        ({CONFIG: b"{}", "adapter_model-00001-of-00002.safetensors": b"x"}, "sharded"),
        ({CONFIG: b"{}", "adapter_model.safetensors.index.json": b"x"}, "sharded"),
        ({CONFIG: b"{", WEIGHTS: b""}, "adapter_config_invalid"),
        ({CONFIG: b"[]", WEIGHTS: b""}, "adapter_config_invalid"),
        ({CONFIG: b'{"r": NaN}', WEIGHTS: b""}, "adapter_config_invalid"),
        ({CONFIG: b"[" * 100_000, WEIGHTS: b""}, "adapter_config_invalid"),
        ({CONFIG: b"\xff\xfe{}", WEIGHTS: b""}, "adapter_config_invalid"),
        ({CONFIG: json.dumps({"peft_type": "LORA"}).encode(), WEIGHTS: b""}, "weights_broken"),
    ],
)
def test_incomplete_folders_are_refused(folder: Path, base: BaseShape, files: dict[str, bytes], code: str) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)

    with pytest.raises(InvalidAdapter) as refusal:
        adapter_format.read(folder, base)

    assert refusal.value.code == code
