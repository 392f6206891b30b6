"""Stored files read into images: the same bytes as packing the factors one by one."""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loraplex_adapters.errors import InvalidAdapter
from loraplex_adapters.format import WEIGHTS_NAME, AdapterWeights, LoraFactors, write
from loraplex_adapters.stored import StoredLayouts
from loraplex_server.engine.adapter_image import AdapterImage, build_image
from loraplex_server.engine.image_source import FileSource, ImageSources
from tests.engine.support import BASE, random_weights

EVERYWHERE = {(layer, linear): 8 for layer in range(2) for linear in BASE.linears}


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def stored(folder: Path, weights: AdapterWeights, dtype: torch.dtype) -> AdapterWeights:
    """The weights as a file of this dtype holds them."""
    write(folder, AdapterWeights({m: LoraFactors(f.a, f.b, f.scaling) for m, f in weights.factors.items()}))
    path = folder / WEIGHTS_NAME
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    return StoredLayouts().locate(folder).weights()


def image_of(folder: Path, threads: Executor, dtype: torch.dtype, *, rank_major: bool, on_device: bool) -> AdapterImage:
    """The image in memory that held something else before, finished as the device finishes it."""
    sources = ImageSources(BASE, dtype, rank_major=rank_major, rescale_on_device=on_device)
    source = sources.source(StoredLayouts().locate(folder))
    image = source.image(torch.full((source.layout.num_elements,), torch.nan, dtype=dtype), threads)
    for rescale in image.rescales:
        rescale.apply(image.data)
    return image


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.dictionaries(
        st.tuples(st.integers(0, 1), st.sampled_from(sorted(BASE.linears))), st.integers(1, 40), min_size=1
    ),
    file_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scaling=st.sampled_from([1.0, 2.0, 0.3]),
    rank_major=st.booleans(),
    on_device=st.booleans(),
)
def test_a_file_becomes_the_image_that_its_factors_would(
    tmp_path: Path,
    threads: Executor,
    ranks: dict[tuple[int, str], int],
    file_dtype: torch.dtype,
    dtype: torch.dtype,
    scaling: float,
    rank_major: bool,
    on_device: bool,
) -> None:
    factors = stored(tmp_path, random_weights(ranks, scaling=scaling), file_dtype)
    expected = build_image(factors, BASE, dtype, pinned=False, rank_major=rank_major)
    got = image_of(tmp_path, threads, dtype, rank_major=rank_major, on_device=on_device)
    assert torch.equal(got.data, expected.data)


def test_what_need_not_change_is_read_to_its_place_and_scaled_in_one_run_a_linear(tmp_path: Path) -> None:
    stored(tmp_path, random_weights(EVERYWHERE, scaling=2.0), torch.bfloat16)
    sources = ImageSources(BASE, torch.bfloat16, rank_major=False, rescale_on_device=True)
    source = sources.source(StoredLayouts().locate(tmp_path))
    assert isinstance(source, FileSource)
    assert all(read.direct for batch in source.plan.batches for read in batch)
    assert len(source.plan.batches) == 1
    assert len(source.plan.rescales) == len(BASE.linears)


def test_adapters_that_are_alike_share_one_plan(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        stored(tmp_path / name, random_weights(EVERYWHERE, seed), torch.bfloat16)
    layouts = StoredLayouts()
    sources = ImageSources(BASE, torch.bfloat16, rank_major=False, rescale_on_device=True)
    first, second = (sources.source(layouts.locate(tmp_path / name)) for name in "ab")
    assert first.layout is second.layout


def test_a_file_that_has_become_shorter_since_it_was_planned_is_refused(tmp_path: Path, threads: Executor) -> None:
    stored(tmp_path, random_weights(EVERYWHERE), torch.float32)
    sources = ImageSources(BASE, torch.float32, rank_major=False, rescale_on_device=False)
    source = sources.source(StoredLayouts().locate(tmp_path))
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InvalidAdapter, match="shorter"):
        source.image(torch.empty(source.layout.num_elements), threads)
