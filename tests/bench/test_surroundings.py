"""What stands around a measurement: its circumstances, its files, its pictures, and peers that are not there."""

import csv
import multiprocessing
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from loraplex_server.bench import plot, record, vllm_peer
from loraplex_server.bench.output import Column, Output
from loraplex_server.bench.peers import PEERS, PeerSize, PeerUnavailable, open_peer
from loraplex_server.bench.rig import BaseChoice


def size(tmp_path: Path, device: str = "cpu") -> PeerSize:
    return PeerSize(BaseChoice("tiny", torch.device(device)), (8,), 4, 64, tmp_path)


def test_the_commit_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(record.COMMIT_VARIABLE, "abc123")
    assert record.circumstances(["no-such-package", "rich"])["commit"] == "abc123"
    assert "no-such-package" not in record.circumstances(["no-such-package"])


def test_the_commit_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(record.COMMIT_VARIABLE, raising=False)
    module = tmp_path / "record.py"
    module.touch()
    monkeypatch.setattr(record, "__file__", str(module))
    assert record.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    # Installed below somebody else's repository: not our commit.
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    assert record.commit() == "unknown"
    subprocess.run([*git, "add", "record.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert len(record.commit()) == 12
    module.write_text("changed")
    assert record.commit().endswith("-dirty")


def test_rows_of_different_columns_go_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    record.write_csv(path, [{"a": 1, "b": 2}, {"a": 3, "c": 4}])
    with path.open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "2", "c": ""}, {"a": "3", "b": "", "c": "4"}]


def test_without_matplotlib_the_csv_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    output = Output(tmp_path, "decode_x", (Column("engine", "engine"), Column("ms", "ms_per_step_median")), console)
    output.add(
        {
            "engine": "loraplex",
            "mode": "greedy",
            "ms_per_step_median": 1.5,
            "shape": "x",
            "ranks": "8",
            "prompt_tokens": 1,
            "batch": 1,
            "adapters": 0,
        }
    )
    output.finish(plot.decode_plot)
    console.file.close()
    assert (tmp_path / "decode_x.csv").is_file()
    assert not (tmp_path / "decode_x.png").exists()
    assert "matplotlib is not installed" in console.export_text()


def test_peers_that_are_not_there_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PEERS) == {"transformers", "transformers-plain", "vllm", "vllm-plain"}
    with pytest.raises(PeerUnavailable, match="not installed"):
        open_peer("vllm", size(tmp_path))
    monkeypatch.setattr(vllm_peer.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(PeerUnavailable, match="GPU only"):
        open_peer("vllm", size(tmp_path))


def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Modules in vLLM's place; the calls they get."""
    calls: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def generate(self, prompts: Any, params: Any, **options: Any) -> None:
            if len(prompts) > 2:
                raise MemoryError("too many")
            calls.append({"prompts": prompts, "params": params, **options})

    vllm, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: (name, number)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return calls


def test_vllm_gets_the_base_and_the_adapters_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_FLASHINFER_SAMPLER", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")  # put back what the process sets
    calls = fake_vllm(monkeypatch)
    settings = vllm_peer._written(size(tmp_path), "nf4")
    assert (settings.model / "model.safetensors.index.json").is_file()
    assert (settings.adapters[0] / "adapter_model.safetensors").is_file()
    ours, theirs = multiprocessing.Pipe()
    process = threading.Thread(target=vllm_peer._serve, args=(theirs, settings))
    process.start()
    assert ours.recv() == 0.0
    ours.send(([[1, 2], [3]], [0, None], 5))
    assert ours.recv() > 0
    ours.send(([[1]] * 3, [None] * 3, 5))
    assert "too many" in ours.recv()
    ours.close()
    process.join()
    theirs.close()
    start, generate = calls
    assert start["quantization"] == "bitsandbytes"
    assert (start["enable_lora"], start["max_loras"], start["max_lora_rank"]) == (True, 1, 8)
    assert generate["prompts"] == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    assert generate["lora_request"] == [("a0", 1), None]
    assert (generate["params"]["min_tokens"], generate["params"]["temperature"]) == (5, 0.0)


def test_vllm_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_FLASHINFER_SAMPLER", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")
    ours, theirs = multiprocessing.Pipe()
    vllm_peer._serve(theirs, vllm_peer._written(size(tmp_path), "none"))
    assert "did not start" in ours.recv()
    ours.close()
    theirs.close()
