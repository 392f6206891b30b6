"""What adapters hold beside low-rank updates: read, checked against the base, written back, and part of their identity."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapters import format as adapter_format
from loraplex_adapters.base import EMBED, FINAL_NORM, HEAD, BaseShape, ModuleKey
from loraplex_adapters.combine import Part, combine
from loraplex_adapters.errors import InvalidAdapter, UnsupportedAdapter, WrongBase
from loraplex_adapters.store import AdapterStore
from loraplex_adapters.weights import AdapterWeights, LoraFactors, TokenRows
from tests.adapters.making import HIDDEN, KV, MLP, edit_config, edit_tensors, random_weights, save_random, tiny_base

VOCAB = 64
WITH_BIASES = replace(tiny_base(), biases=frozenset({"q_proj", "k_proj", "v_proj"}))
TIED = replace(tiny_base(), tied_embeddings=True)
Q: ModuleKey = (0, "q_proj")


def everything() -> AdapterWeights:
    """One adapter with whatever can go together."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factors = {
        module: replace(lora, magnitude=randn(lora.b.shape[0]).abs())
        for module, lora in random_weights(linears=("q_proj", "down_proj")).factors.items()
    }
    factors[HEAD] = LoraFactors(randn(2, HIDDEN), randn(VOCAB + 3, 2), 0.5, randn(VOCAB + 3).abs())
    return AdapterWeights(
        factors,
        biases={(layer, "q_proj"): randn(HIDDEN) for layer in range(3)},
        whole={FINAL_NORM: randn(HIDDEN), (1, "input_layernorm"): randn(HIDDEN), HEAD: randn(VOCAB + 3, HIDDEN)},
        rows={EMBED: TokenRows((5, 63), randn(2, HIDDEN))},
    )


def parts(weights: AdapterWeights) -> list[tuple[str, ModuleKey, torch.Tensor]]:
    return sorted(weights.tensors(), key=lambda part: (part[0], part[1], part[2].shape))


def test_everything_is_read_back_as_it_was_written(folder: Path) -> None:
    weights = everything()

    adapter_format.write(folder, weights)
    again = adapter_format.read(folder, WITH_BIASES)

    assert again.factors.keys() == weights.factors.keys()
    assert again.rows[EMBED].indices == (5, 63)
    for (_, module, tensor), (_, same, other) in zip(parts(weights), parts(again), strict=True):
        assert module == same
        assert torch.equal(tensor, other)
    assert not again.is_plain


def test_stacked_linears_are_stored_as_their_parts(folder: Path, tmp_path: Path, base: BaseShape) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, HIDDEN, generator=generator), torch.randn(HIDDEN + 2 * KV, 4, generator=generator)
    gate_up = torch.randn(2 * MLP, 4, generator=generator)
    save_random(folder, rank=4, linears=("o_proj",))
    stacked: dict[str, torch.Tensor | None] = {}
    for layer in range(3):
        prefix = f"base_model.model.model.layers.{layer}"
        stacked[f"{prefix}.self_attn.qkv_proj.lora_A.weight"] = a.clone()
        stacked[f"{prefix}.self_attn.qkv_proj.lora_B.weight"] = b.clone()
        stacked[f"{prefix}.mlp.gate_up_proj.lora_A.weight"] = a.clone()
        stacked[f"{prefix}.mlp.gate_up_proj.lora_B.weight"] = gate_up.clone()
    edit_config(edit_tensors(folder, stacked), target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    apart = tmp_path / "apart"
    adapter_format.write(apart, adapter_format.read(folder, base))
    store = AdapterStore(tmp_path / "store")

    with store.stage() as staged:
        adapter_format.write(staged, adapter_format.read(apart, base))
        expected = store.prepare(staged, base)
    with store.stage() as staged:
        for path in folder.iterdir():
            (staged / path.name).write_bytes(path.read_bytes())
        manifest = store.commit(staged, base)

    assert set(manifest.target_modules) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj"}
    assert manifest.digest == expected.digest
    factors = store.open(manifest.digest).factors
    assert torch.equal(factors[0, "k_proj"].b, b[HIDDEN : HIDDEN + KV])
    assert torch.equal(factors[2, "up_proj"].b, gate_up[MLP:])
    assert torch.equal(factors[2, "up_proj"].a, a)


def test_the_manifest_names_the_features(folder: Path, store: AdapterStore) -> None:
    with store.stage() as staged:
        adapter_format.write(staged, everything())
        manifest = store.commit(staged, WITH_BIASES)

    assert manifest.features == ("dora", "bias", "head_lora", "modules_to_save", "trainable_tokens")
    assert AdapterStore(store.root).manifest(manifest.digest) == manifest
    assert manifest.num_bytes == everything().num_bytes
    assert manifest.num_parameters == everything().num_parameters


@pytest.mark.parametrize(
    "change",
    [
        {"rows": {EMBED: TokenRows((5, 62), everything().rows[EMBED].values)}},
        {"rows": {}},
        {"biases": {module: bias + 1 for module, bias in everything().biases.items()}},
        {"whole": {**everything().whole, FINAL_NORM: torch.ones(HIDDEN)}},
        {"ties_lora": True},
    ],
    ids=["other tokens", "no tokens", "biases", "norm", "tying"],
)
def test_all_of_it_is_part_of_the_identity(store: AdapterStore, change: dict[str, Any]) -> None:
    digests = []
    for weights in (everything(), replace(everything(), **change)):
        with store.stage() as staged:
            adapter_format.write(staged, weights)
            digests.append(store.prepare(staged, WITH_BIASES).digest)

    assert digests[0] != digests[1]


def test_trained_tokens_are_the_heads_too_where_the_base_shares_them(folder: Path) -> None:
    rows = TokenRows((1, 2), torch.ones(2, HIDDEN))
    adapter_format.write(folder, replace(random_weights(), rows={EMBED: rows}))

    assert HEAD not in adapter_format.read(folder, tiny_base()).rows
    assert adapter_format.read(folder, TIED).rows[HEAD].indices == (1, 2)


def test_embeddings_are_the_heads_too_only_if_the_config_says_so(folder: Path) -> None:
    weights = replace(random_weights(), whole={EMBED: torch.ones(VOCAB, HIDDEN)})
    adapter_format.write(folder, weights)
    assert HEAD not in adapter_format.read(folder, TIED).whole

    edit_config(folder, ensure_weight_tying=True)

    assert torch.equal(adapter_format.read(folder, TIED).whole[HEAD], weights.whole[EMBED])
    assert HEAD not in adapter_format.read(folder, tiny_base()).whole


@pytest.mark.parametrize(
    ("weights", "error", "code"),
    [
        ({"biases": {Q: torch.ones(HIDDEN)}}, WrongBase, "module_not_in_base"),
        ({"whole": {(0, "q_norm"): torch.ones(8)}}, WrongBase, "module_not_in_base"),
        ({"whole": {FINAL_NORM: torch.ones(HIDDEN + 1)}}, WrongBase, "shape_mismatch"),
        ({"whole": {HEAD: torch.ones(VOCAB, HIDDEN + 1)}}, WrongBase, "shape_mismatch"),
        ({"rows": {EMBED: TokenRows((VOCAB,), torch.ones(1, HIDDEN))}}, WrongBase, "token_not_in_base"),
        ({"rows": {HEAD: TokenRows((1,), torch.ones(1, HIDDEN - 1))}}, WrongBase, "shape_mismatch"),
        ({"rows": {HEAD: TokenRows((1,), torch.full((1, HIDDEN), torch.nan))}}, InvalidAdapter, "not_finite"),
        (
            {
                "factors": {HEAD: LoraFactors(torch.ones(2, HIDDEN), torch.ones(VOCAB, 2), 1.0)},
                "rows": {HEAD: TokenRows((1,), torch.ones(1, HIDDEN))},
            },
            UnsupportedAdapter,
            "lora_and_tokens",
        ),
        (
            {"factors": {HEAD: LoraFactors(torch.ones(2, HIDDEN), torch.ones(VOCAB + 1, 2), 1.0)}},
            WrongBase,
            "shape_mismatch",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    folder: Path, base: BaseShape, weights: dict[str, Any], error: type[InvalidAdapter], code: str
) -> None:
    adapter_format.write(folder, replace(random_weights(), **weights))

    with pytest.raises(error) as refusal:
        adapter_format.read(folder, base)

    assert refusal.value.code == code


def test_biases_that_were_trained_and_not_saved_are_missed(folder: Path) -> None:
    edit_config(save_random(folder), bias="all")

    with pytest.raises(InvalidAdapter, match="does not hold the trained bias"):
        adapter_format.read(folder, WITH_BIASES)


def test_dora_on_embeddings_that_the_head_shares_is_refused(folder: Path) -> None:
    embedding = LoraFactors(torch.ones(2, VOCAB), torch.ones(HIDDEN, 2), 1.0, torch.ones(HIDDEN))
    adapter_format.write(folder, AdapterWeights({EMBED: embedding}, ties_lora=True))

    with pytest.raises(UnsupportedAdapter) as refusal:
        adapter_format.read(folder, TIED)

    assert refusal.value.code == "dora_tied"


def test_only_low_rank_updates_are_combined() -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        combine([Part(random_weights(), 1.0), Part(everything(), 0.5)])

    assert refusal.value.code == "combine_beyond_lora"
