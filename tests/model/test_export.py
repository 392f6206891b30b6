"""What `loraplex merge` writes, read back by transformers and compared with peft's own merge."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from loraplex_adapters.combine import Part
from loraplex_adapters.errors import InvalidAdapter
from loraplex_adapters.fold import check_foldable, fold
from loraplex_adapters.format import read
from loraplex_server.cli import app
from loraplex_server.kernels.nf4 import Nf4Weight
from loraplex_server.model.base_shape import base_shape
from loraplex_server.model.export import Exported, Precision, Start, export
from loraplex_server.model.spec import ModelSpec
from tests.models import FAMILIES, make_adapter, make_checkpoint

TOKENS = torch.tensor([[7, 1, 200, 33, 14, 90]])


def merged(base: Path, adapter: Path, out: Path, weight: float = 1.0, **options: object) -> Exported:
    parts = [Part(read(adapter, base_shape(ModelSpec.from_folder(base), "")), weight)]
    return export(base, out, lambda linear, given: fold(linear, given, parts), **options)  # type: ignore[arg-type]


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merged_checkpoint_is_what_peft_merges(family: str, use_dora: bool, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", base, rank=4, use_rslora=True, use_dora=use_dora)
    done = merged(base, adapter, tmp_path / "out", start=Start.STORED, dtype=torch.float32)
    assert done.num_changed == 14
    torch.testing.assert_close(logits(tmp_path / "out"), peft_logits(base, adapter), rtol=1e-4, atol=1e-4)


def test_shards_are_small_and_complete(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, rank=4)
    whole = merged(base, adapter, tmp_path / "whole")
    cut = merged(base, adapter, tmp_path / "cut", shard_bytes=60_000)
    assert (whole.num_shards, whole.num_bytes) == (1, cut.num_bytes)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert cut.num_shards == len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == cut.num_bytes
    assert torch.equal(logits(tmp_path / "cut"), logits(tmp_path / "whole"))


def test_updates_are_added_to_what_is_served(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, rank=4, targets=["q_proj"])
    done = merged(base, adapter, tmp_path / "out", weight=-0.5, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    stored, written = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[name], Nf4Weight.quantize(stored[name]).dequantize(torch.float32))
    parts = read(adapter, base_shape(ModelSpec.from_folder(base), ""))
    name, lora = "model.layers.0.self_attn.q_proj.weight", parts.factors[0, "q_proj"]
    expected = Nf4Weight.quantize(stored[name]).dequantize(torch.float32) - 0.5 * lora.scaling * lora.b @ lora.a
    torch.testing.assert_close(written[name], expected)
    assert done.rounding == 0


def test_an_nf4_checkpoint_is_read_by_us_as_it_was_written(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, rank=4)
    done = merged(base, adapter, tmp_path / "nf4", precision=Precision.NF4)
    assert 0 < done.rounding < 0.15
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    export(tmp_path / "nf4", tmp_path / "again", lambda _, weight: weight, dtype=torch.float32)
    written = load_file(tmp_path / "again" / "model.safetensors")
    merged(base, adapter, tmp_path / "plain", dtype=torch.bfloat16)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(written[name], Nf4Weight.quantize(plain[name]).dequantize(torch.float32))


def test_an_nf4_checkpoint_is_loaded_by_transformers(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, rank=4)
    merged(base, adapter, tmp_path / "nf4", precision=Precision.NF4)
    export(tmp_path / "nf4", tmp_path / "dense", lambda _, weight: weight, dtype=torch.float32)
    theirs, ours = logits(tmp_path / "nf4").float(), logits(tmp_path / "dense")
    assert float((theirs - ours).norm() / ours.norm()) < 0.02  # bitsandbytes multiplies in bfloat16


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")

    def full(_: object, __: torch.Tensor) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        export(base, tmp_path / "out", full)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    with pytest.raises(FileExistsError):
        export(base, base, lambda _, weight: weight)


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    shape = base_shape(ModelSpec.from_folder(base), "")
    dora = Part(read(make_adapter(tmp_path / "dora", base, rank=4, use_dora=True), shape), 1.0)
    plain = Part(read(make_adapter(tmp_path / "plain", base, rank=4), shape), 1.0)
    head = Part(read(make_adapter(tmp_path / "head", base, rank=4, modules_to_save=["lm_head"]), shape), 1.0)
    check_foldable([dora])
    check_foldable([plain, plain])
    for parts, code in (
        ([dora, plain], "fold_dora_mixed"),
        ([Part(dora.weights, 0.5)], "fold_dora_mixed"),
        ([head], "fold_unsupported"),
    ):
        with pytest.raises(InvalidAdapter) as refused:
            check_foldable(parts)
        assert refused.value.code == code


def test_the_command_merges_a_mix_and_says_what_it_wrote(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    one, two = (make_adapter(tmp_path / name, base, seed=seed, rank=4) for name, seed in (("one", 1), ("two", 2)))
    arguments = ["merge", f"{one}:0.7", f"{two}:-0.3", "--model", str(base), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "14 linears changed" in result.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "exists already" in again.output
