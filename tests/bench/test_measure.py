"""Decode and prefill through the real engine, on a tiny shape: what the rows say, and that the files are written."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from loraplex_server.bench import floor, peers
from loraplex_server.bench.cases import Case, Load, sampling_of, spread_ranks
from loraplex_server.bench.checkpoint import random_adapter, write_adapter, write_checkpoint
from loraplex_server.bench.rig import BaseChoice, CaseFailed, Rig, RigSize, load_base
from loraplex_server.bench.shapes import SHAPES, base_shape_of, spec_of
from loraplex_server.cli import app
from loraplex_server.commands.bench_options import Shape
from loraplex_server.demo import DEMO_MODEL

CPU = torch.device("cpu")


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_decode_writes_rows_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = bench(
        *("decode", "--shape", "tiny", "--device", "cpu", "--cases", "1/0 4/2", "--modes", "greedy,sampled,logprobs"),
        *("--ranks", "8,24", "--prompt-tokens", "12", "--new-tokens", "10", "--peers", "transformers,vllm"),
        *("--peer-cases", "4/2"),
        *("--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "decode_tiny.csv")
    ours = [row for row in rows if row["engine"] == "loraplex"]
    cases = [(mode, *case) for mode in ("greedy", "sampled", "logprobs") for case in (("1", "0"), ("4", "2"))]
    assert [(row["mode"], row["batch"], row["adapters"]) for row in ours] == cases
    for row in ours:
        assert float(row["ms_per_step_p10"]) <= float(row["ms_per_step_median"]) <= float(row["ms_per_step_p90"])
        assert float(row["times_floor"]) > 1
        assert row["ranks"] == "8 24"
        assert row["commit"]
        assert row["torch"] == torch.__version__
    (theirs,) = {row["engine"] for row in rows} - {"loraplex"}
    assert theirs.startswith("transformers")
    (row,) = [row for row in rows if row["engine"] == theirs]
    assert (row["batch"], row["adapters"]) == ("4", "2")
    assert float(row["ratio"]) > 0
    assert "vllm is left out: it is not installed" in done.output
    assert (tmp_path / "decode_tiny.png").read_bytes().startswith(b"\x89PNG")


def test_prefill_writes_rows_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = bench(
        *("prefill", "--shape", "tiny", "--device", "cpu", "--cases", "2/0,2/2", "--lengths", "8,20", "--repeats", "2"),
        *("--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "prefill_tiny.csv")
    assert [(row["adapters"], row["prompt_tokens"]) for row in rows] == [
        ("0", "8"),
        ("2", "8"),
        ("0", "20"),
        ("2", "20"),
    ]
    for row in rows:
        assert float(row["prefill_tokens_per_s_min"]) <= float(row["prefill_tokens_per_s"])
        assert float(row["first_token_ms_median"]) > 0
    assert (tmp_path / "prefill_tiny.png").exists()


def test_a_model_on_this_machine_is_measured_as_it_is(tmp_path: Path) -> None:
    done = bench(
        *("decode", "--model", str(DEMO_MODEL), "--device", "cpu", "--cases", "2/2", "--prompt-tokens", "6"),
        *("--new-tokens", "8", "--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    (row,) = rows_of(tmp_path / "decode_model.csv")
    assert (row["shape"], row["source"]) == ("model", "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--model", "no/such/folder"), "no config.json"),
        (("decode", "--cases", "8"), "'8' is no case"),
        (("decode", "--cases", "2/3"), "no more adapters than sequences"),
        (("decode", "--cases", ""), "empty list"),
        (("decode", "--modes", "loud"), "--modes does not know 'loud'"),
        (("decode", "--ranks", "0"), "not a positive whole number"),
        (("prefill", "--peers", "llama"), "--peers does not know 'llama'"),
    ],
)
def test_mistakes_end_the_command_with_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = bench(arguments[0], "--shape", "tiny", "--device", "cpu", *arguments[1:])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    done = bench("decode", "--shape", "tiny", "--device", "cuda")
    assert done.exit_code == 2
    assert "no GPU" in done.output


def test_every_shape_can_be_chosen() -> None:
    assert {shape.value for shape in Shape} == set(SHAPES)


def test_the_floor_counts_what_a_step_must_read() -> None:
    spec, bf16 = spec_of("llama-8b"), torch.bfloat16
    linears, head = 6_979_321_856, 128_256 * 4096 * 2
    assert floor.weight_bytes(spec, bf16, "none") == linears * 2 + head
    nf4 = linears / 2 + linears / 64 + linears / 64 / 256 * 4  # codes, a byte a block, and the blocks' own scales
    assert floor.weight_bytes(spec, bf16, "nf4") == pytest.approx(nf4 + head)
    rank_16 = sum(16 * (n + k) for n, k in spec.linears.values()) * 32 * 2
    assert floor.adapter_bytes(spec, bf16, 16) == rank_16 == 83_886_080
    keys = 2 * 32 * 8 * 128 * 2 * 100  # of one sequence
    found = floor.decode_bytes(spec, bf16, "nf4", batch=4, tokens=100, ranks=(16, 32))
    assert found == pytest.approx(nf4 + head + 4 * keys + 3 * rank_16)


def test_sequences_take_adapters_in_turn() -> None:
    assert [Case(5, 2).adapter_of(i) for i in range(5)] == ["a0", "a1", "a0", "a1", "a0"]
    assert Case(2, 0).adapter_of(1) is None
    assert spread_ranks((8, 256), 3) == (8, 256, 8)


def test_loads_are_the_same_for_every_engine() -> None:
    load = Load(Case(2, 1), 5, 3, seed=7)
    assert load.prompts(100) == load.prompts(100) != Load(Case(2, 1), 5, 3, seed=8).prompts(100)
    first, second = load.requests(100, "logprobs")
    assert first.prompt_ids == tuple(load.prompts(100)[0])
    assert (first.adapter, second.adapter) == ("a0", "a0")
    assert first.sampling.num_logprobs == 5
    assert sampling_of("greedy", 3).temperature == 0


def test_a_request_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    base = load_base(BaseChoice("tiny", CPU), tmp_path)
    with Rig(base, RigSize(max_running=1, max_tokens=16)) as rig, pytest.raises(CaseFailed, match="16"):
        list(rig.run(Load(Case(1, 0), 20, 2).requests(rig.vocab_size)))


def test_a_checkpoint_on_disk_loads(tmp_path: Path) -> None:
    base = load_base(BaseChoice("tiny", CPU, checkpoint=True), tmp_path)
    assert base.columns()["source"] == "checkpoint"
    assert base.decoder.spec == spec_of("tiny")


def test_adapters_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    from loraplex_adapters.format import read

    shape = base_shape_of("tiny")
    made, written = (
        random_adapter(shape, rank=3, seed=5),
        read(write_adapter(tmp_path / "a", "tiny", rank=3, seed=5), shape),
    )
    assert made.ranks == written.ranks
    for module, factors in made.factors.items():
        assert torch.equal(factors.a, written.factors[module].a)
        assert torch.equal(factors.b, written.factors[module].b)


def test_shards_hold_every_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex_server.bench.checkpoint._SHARD_BYTES", 1 << 20)
    write_checkpoint(tmp_path, "tiny")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    from loraplex_server.model.loader import load

    assert load(tmp_path, device=CPU, dtype=torch.float32).spec == spec_of("tiny")


def test_ratios_say_how_many_times_as_fast_ours_is() -> None:
    ours = [{"batch": 8, "adapters": 4, "ms_per_step_median": 2.0, "prefill_tokens_per_s": 50.0}]
    keys = ("batch", "adapters")
    row = {"batch": 8, "adapters": 4, "ms_per_step_median": 6.0, "prefill_tokens_per_s": 10.0}
    assert peers.ratio(row, ours, keys, "ms_per_step_median") == 3.0
    assert peers.ratio(row, ours, keys, "prefill_tokens_per_s") == 5.0
    assert peers.ratio({**row, "batch": 9}, ours, keys, "ms_per_step_median") == ""
