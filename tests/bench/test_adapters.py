"""``loraplex bench adapters``: every part on a tiny base."""

from pathlib import Path

import pytest
import torch

from loraplex_server.bench import adapters
from loraplex_server.bench.adapters import AdaptersPlan
from loraplex_server.bench.adapters_plot import adapters_plot
from loraplex_server.bench.library import AdapterLibrary
from loraplex_server.bench.rig import BaseChoice, LoadedBase, load_base

PLAN = AdaptersPlan(
    ranks=(8, 16),
    num_loads=3,
    num_streams=2,
    stream_s=0.2,
    load_every_s=0.05,
    registered=(5, 300),
    concurrency=3,
    num_requests=12,
    prompt_tokens=8,
    new_tokens=4,
    device_adapters=4,
    host_adapters=24,
    num_files=2,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return load_base(BaseChoice("tiny", torch.device("cpu"), quantization="none"), tmp_path_factory.mktemp("base"))


def test_every_part_is_measured_and_drawn(base: LoadedBase, tmp_path: Path) -> None:
    rows = adapters.measure(base, PLAN)
    loads = [row for row in rows if row["part"] == "load"]
    kinds = {
        "disk to host",
        "host to device",
        "first token, from disk",
        "first token, from host",
        "first token, resident",
    }
    assert {(row["rank"], row["what"]) for row in loads} == {(rank, kind) for rank in (8, 16) for kind in kinds}
    assert all(row["count"] >= 3 and 0 < row["ms_p50"] <= row["ms_p95"] for row in loads)
    alone, beside, again = (row for row in rows if row["part"] == "stream")
    assert (alone["loads"], again["loads"]) == (0, 0)
    assert beside["loads"] >= 2
    few, many = (row for row in rows if row["part"] == "rate")
    assert (few["registered"], many["registered"], few["ratio"]) == (5, 300, 1.0)
    assert many["adapters_used"] > few["adapters_used"]
    assert many["loads"] > 0
    pytest.importorskip("matplotlib")
    assert adapters_plot(rows, tmp_path / "adapters.png").stat().st_size > 10_000


def test_adapters_of_one_file_are_several_to_the_engine(base: LoadedBase, tmp_path: Path) -> None:
    library = AdapterLibrary(tmp_path, base, (8,), num_files=2, seed=0)
    first, second, third = (library.open(library.name(8, i)) for i in (0, 1, 2))
    assert first.directory == third.directory != second.directory
    assert first.layout is second.layout
