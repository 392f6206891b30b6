"""The README's measured section is what the CSV files say, and says so where there are none."""

from pathlib import Path

import pytest
from benchmarks.report import BEGIN, END, NOTHING, README, with_measurements

from loraplex_server.bench.record import write_csv

MARKED = f"before\n{BEGIN}\nold\n{END}\nafter\n"


def cpu_row(engine: str, concurrency: int, repeat: int, rate: float) -> dict[str, object]:
    load = {"concurrency": concurrency, "adapters": 4, "prompt_tokens": 128, "new_tokens": 32}
    where = {"device": "a CPU", "commit": "abc", "torch": "2.13.0"}
    return {"engine": engine, **load, "repeat": repeat, "seconds": 1, "output_tokens_per_s": rate, **where}


def test_without_files_it_says_that_nothing_was_measured(tmp_path: Path) -> None:
    assert with_measurements(MARKED, tmp_path) == f"before\n{BEGIN}\n\n{NOTHING}\n\n{END}\nafter\n"


def test_medians_and_the_ratio_to_each_peer(tmp_path: Path) -> None:
    rates = {
        "loraplex float32": (30, 50, 40),
        "transformers+peft float32": (10, 9, 11),
        "transformers+peft bfloat16": (8, 8, 8),
    }
    rows = [cpu_row(engine, 8, repeat, rate) for engine, found in rates.items() for repeat, rate in enumerate(found)]
    write_csv(tmp_path / "serving_cpu.csv", rows)
    written = with_measurements(MARKED, tmp_path)
    assert "| 8 | 4 | loraplex float32 | 40.0 |  |" in written
    assert "| 8 | 4 | transformers+peft float32 | 10.0 | 4.00 |" in written
    assert "Medians of 3 runs" in written
    assert "a CPU" in written
    assert "old" not in written


def test_steps_by_batch_and_adapters_beside_a_peer(tmp_path: Path) -> None:
    case = {"mode": "greedy", "batch": 8, "adapters": 4, "shape": "llama-8b", "ranks": "8 256", "device": "a GPU"}
    times = {"ms_per_step_median": 1.5, "ms_per_step_p10": 1.25, "ms_per_step_p90": 2, "floor_ms": 1.1}
    ours = {"engine": "loraplex", **case, **times, "output_tokens_per_s": 5333.3, "load_s": 9.5, "source": "checkpoint"}
    theirs = {"engine": "peer 1.0", **case, "ms_per_step_median": 30.0, "ratio": 20.0}
    write_csv(tmp_path / "decode_gpu.csv", [ours, theirs])
    (tmp_path / "decode_gpu.png").touch()
    written = with_measurements(MARKED, tmp_path)
    assert "| 8 | 4 | 1.50 | 1.25 | 2.00 | 1.10 | 5,333 | 30.0 (20.0 x) |" in written
    assert "peer 1.0: ms (ours is faster by)" in written
    assert "adapters of rank 8 and 256" in written
    assert "loaded from a checkpoint in 9.5 s" in written
    assert "[plot](benchmarks/results/decode_gpu.png)" in written


def test_prompts_a_second(tmp_path: Path) -> None:
    waits = {"first_token_ms_median": 450.4, "first_token_ms_p90": 800}
    case = {"batch": 32, "adapters": 8, "prompt_tokens": 1024, "shape": "llama-8b", "device": "a GPU"}
    write_csv(tmp_path / "prefill_gpu.csv", [{"engine": "loraplex", **case, "prefill_tokens_per_s": 39055.1, **waits}])
    assert "| 32 | 8 | 1024 | 39,055 | 450 | 800 |" in with_measurements(MARKED, tmp_path)


def test_a_served_load(tmp_path: Path) -> None:
    latencies = {f"{name}_ms_{key}": 2.5 for name in ("first_token", "inter_token") for key in ("p50", "p99")}
    case = {"engine": "loraplex", "concurrency": 32, "rate": "", "adapters": 8, "output_tokens_per_s": 9000.4}
    write_csv(tmp_path / "serve_gpu.csv", [{**case, **latencies}])
    write_csv(tmp_path / "serve_gpu_by_model.csv", [{"model": "a", "anything": 1}])
    assert "| 32 | 9,000 | 2.50 | 2.50 | 2.50 | 2.50 |" in with_measurements(MARKED, tmp_path)


def test_a_readme_without_the_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks"):
        with_measurements("no markers", tmp_path)


def test_the_readme_says_what_the_files_say() -> None:
    readme = README.read_text(encoding="utf-8")
    assert with_measurements(readme) == readme, "write it with: python -m benchmarks.report"
