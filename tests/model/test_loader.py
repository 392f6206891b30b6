"""Loading: shards, tied heads, dtypes, dummies, progress and memory; and every way in which a checkpoint is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_server.model.errors import BadCheckpoint, ModelNotFound, UnsupportedModel
from loraplex_server.model.loader import load
from tests.model.support import random_tokens, run_alone
from tests.models import FAMILIES, make_checkpoint


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add, or (None) remove tensors of a single-file checkpoint; names with __ for dots."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_shards_hold_the_same_model(family_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole = load(family_checkpoints["llama"], device="cpu")
    assert load(sharded, device="cpu").hash_weights() == whole.hash_weights()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_are_computed_in_the_dtype_asked_for(stored: torch.dtype, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, dtype=stored)
    wide = load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
    assert wide.dtype == torch.float32
    assert run_alone(wide, random_tokens(4)).isfinite().all()


def test_progress_ends_at_the_bytes_of_the_checkpoint(family_checkpoints: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = family_checkpoints["qwen3"]
    load(checkpoint, device="cpu", progress=lambda done, total: seen.append((done, total)))
    total = sum(t.numel() * t.element_size() for t in load_file(checkpoint / "model.safetensors").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_base_is_never_written_by_running_it(family_checkpoints: dict[str, Path]) -> None:
    decoder = load(family_checkpoints["qwen3"], device="cpu")
    before = decoder.hash_weights()
    run_alone(decoder, random_tokens(20))
    assert decoder.hash_weights() == before


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dummy_needs_only_the_config(
    family: str, quantization: Any, family_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((family_checkpoints[family] / "config.json").read_bytes())
    options: dict[str, Any] = {"device": "cpu", "quantization": quantization, "load_format": "dummy"}
    first, second = load(tmp_path, **options), load(tmp_path, **options)
    assert first.hash_weights() == second.hash_weights()
    assert run_alone(first, random_tokens(8)).isfinite().all()


def test_the_fingerprint_follows_the_content_and_not_the_place(
    family_checkpoints: dict[str, Path], copied: Path
) -> None:
    original = load(family_checkpoints["llama"], device="cpu").fingerprint
    assert load(copied, device="cpu", quantization="none").fingerprint == original
    edit_tensors(copied, model__norm__weight=torch.full((64,), 2.0))
    assert load(copied, device="cpu").fingerprint != original


def test_adapters_see_the_base_by_its_shape(family_checkpoints: dict[str, Path]) -> None:
    decoder = load(family_checkpoints["qwen2"], device="cpu")
    shape = decoder.base_shape
    assert (shape.model_type, shape.num_layers, shape.hidden_size) == ("qwen2", 2, 64)
    assert shape.linears["k_proj"] == (32, 64)
    assert shape.fingerprint == decoder.fingerprint


def test_a_tied_head_in_the_file_and_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = {
        "lm_head__weight": torch.zeros(320, 64),
        "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8),
    }
    plain = load(checkpoint, device="cpu").hash_weights()
    edit_tensors(checkpoint, **tensors)
    assert load(checkpoint, device="cpu").hash_weights() == plain


def test_missing_tensors_are_named(copied: Path) -> None:
    edit_tensors(copied, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(BadCheckpoint, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copied, device="cpu")


def test_unexpected_tensors_are_named(copied: Path) -> None:
    edit_tensors(copied, model__layers__0__self_attn__q_proj__bias=torch.zeros(64), extra=torch.zeros(1))
    with pytest.raises(BadCheckpoint, match=r"has no extra, model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(copied, device="cpu")


def test_shapes_must_be_the_config_s(copied: Path) -> None:
    edit_tensors(copied, model__norm__weight=torch.zeros(32))
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight has shape \[32\], the config says \[64\]"):
        load(copied, device="cpu")


def test_integers_are_no_weights(copied: Path) -> None:
    edit_tensors(copied, model__norm__weight=torch.zeros(64, dtype=torch.int8))
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight is torch\.int8"):
        load(copied, device="cpu")


def test_a_file_cut_short_is_refused(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="download it again"):
        load(copied, device="cpu")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, b"\x10" + b"\x00" * 7 + b"not json at all!"])
def test_a_file_that_is_not_safetensors_is_refused(copied: Path, content: bytes) -> None:
    (copied / "model.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors"):
        load(copied, device="cpu")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, max_shard_size="100KB")
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=shard.name):
        load(checkpoint, device="cpu")


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/hostname", "no-such.safetensors"])
def test_an_index_cannot_point_out_of_the_folder(copied: Path, shard: str) -> None:
    (copied / "model.safetensors").rename(copied / "elsewhere.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(BadCheckpoint, match="not in the folder"):
        load(copied, device="cpu")


def test_pickled_weights_are_never_opened(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match=r"pickle \(pytorch_model\.bin\), which is never opened"):
        load(copied, device="cpu")


def test_a_folder_without_weights_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="holds neither"):
        load(copied, device="cpu")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4"])
def test_other_quantized_checkpoints_are_refused_by_name(copied: Path, method: str) -> None:
    edit_config(copied, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModel, match=f"quantized with {method}"):
        load(copied, device="cpu")


def test_eight_bit_checkpoints_are_refused(copied: Path) -> None:
    edit_config(copied, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UnsupportedModel, match="8-bit"):
        load(copied, device="cpu")


@pytest.mark.parametrize("model", ["no-such-folder", "/no/such/folder", "./a/b", "a/b/c", Path("owner/name")])
def test_what_is_neither_a_folder_nor_a_hub_id_is_not_found(model: str | Path) -> None:
    with pytest.raises(ModelNotFound, match="neither a folder nor a Hub id"):
        load(model, device="cpu")


def test_peak_memory_is_the_model_and_one_shard(family_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    checkpoint = make_checkpoint(tmp_path, max_shard_size="32MB", **shape)
    script = (
        "import resource, sys, torch\n"
        "from loraplex_server.model.loader import load\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        # What the libraries take once, whatever the model, is not its loading.
        "load(sys.argv[1], device='cpu', dtype=torch.float32)\n"
        "before = peak()\n"
        "decoder = load(sys.argv[2], device='cpu', dtype=torch.float32)\n"
        "print(peak() - before, decoder.weight_bytes)\n"
    )
    command = [sys.executable, "-c", script, family_checkpoints["llama"], checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, weight_bytes = map(int, done.stdout.split())
    shards = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert len(shards) > 2
    assert taken < weight_bytes + max(shards)
