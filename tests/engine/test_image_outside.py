"""What an image keeps of modules outside the linears, and that it survives the adapter's way out of memory and back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraplex_adapters.base import EMBED, FINAL_NORM, HEAD
from loraplex_adapters.errors import UnsupportedAdapter
from loraplex_adapters.format import AdapterWeights, TokenRows
from loraplex_adapters.format import read as read_adapter
from loraplex_server.engine.image_outside import plan_outside
from loraplex_server.engine.image_source import FactorSource, ImageSources
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.engine.support import real_engine, run
from tests.features import make_feature
from tests.models import VOCAB_SIZE, make_checkpoint

HIDDEN = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    return load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")


def sources(decoder: Decoder) -> ImageSources:
    return ImageSources(decoder.base_shape, decoder.dtype, rank_major=True, rescale_on_device=False, weights=decoder)


def test_of_a_whole_matrix_only_the_rows_that_changed_are_kept(decoder: Decoder) -> None:
    whole = torch.cat((decoder.embed, torch.ones(2, HIDDEN)))
    whole[17] += 1
    weights = AdapterWeights({}, whole={EMBED: whole, HEAD: decoder.weight_rows(HEAD, 0, VOCAB_SIZE)})

    place, sizes = plan_outside(weights, decoder.base_shape, decoder, decoder.dtype)

    assert place is not None
    assert place.matrices[EMBED].tokens.tolist() == [17, VOCAB_SIZE, VOCAB_SIZE + 1]
    assert HEAD not in place.matrices
    assert sizes == (VOCAB_SIZE + 2, VOCAB_SIZE)


def test_matrices_saved_as_the_base_has_them_take_nothing(decoder: Decoder) -> None:
    weights = AdapterWeights({}, whole={EMBED: decoder.embed, HEAD: decoder.weight_rows(HEAD, 0, VOCAB_SIZE)})
    assert plan_outside(weights, decoder.base_shape, decoder, decoder.dtype)[0] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_put_into_an_image_comes_out_of_it(decoder: Decoder, dtype: torch.dtype) -> None:
    weights = AdapterWeights(
        {},
        whole={FINAL_NORM: torch.randn(HIDDEN), HEAD: torch.randn(VOCAB_SIZE - 3, HIDDEN)},
        rows={EMBED: TokenRows((300, 2), torch.randn(2, HIDDEN))},
    )
    place, (_, vocab_size) = plan_outside(weights, decoder.base_shape, decoder, dtype)
    assert place is not None
    place = place.at(8, dtype.itemsize)
    image = torch.zeros(place.end, dtype=dtype)
    place.fill(image, weights)
    parts = place.parts(image, None, None)

    assert torch.equal(parts.norms[FINAL_NORM], weights.whole[FINAL_NORM].to(dtype))
    assert parts.embed is not None
    assert parts.embed.indices.tolist() == [2, 300]
    assert torch.equal(parts.embed.values, weights.rows[EMBED].values[[1, 0]].to(dtype))
    assert parts.head is not None
    assert torch.equal(parts.head.values, weights.whole[HEAD].to(dtype))
    assert vocab_size == parts.vocab_size == VOCAB_SIZE - 3
    assert image[:8].eq(0).all()


def test_a_trained_row_goes_before_the_whole_matrix(decoder: Decoder) -> None:
    whole, rows = torch.randn(VOCAB_SIZE, HIDDEN), TokenRows((4,), torch.ones(1, HIDDEN))
    source = sources(decoder).source(AdapterWeights({}, whole={HEAD: whole}, rows={HEAD: rows}))
    assert isinstance(source, FactorSource)
    assert source.layout.outside is not None
    image = torch.zeros(source.layout.num_elements)
    source.layout.outside.fill(image, source.weights)
    parts = source.layout.outside_parts(image)
    assert parts is not None
    assert parts.head is not None
    assert parts.head.values[4].eq(1).all()
    assert torch.equal(parts.head.values[5], whole[5])


def test_norms_are_computed_once_for_an_adapter_that_comes_again(
    checkpoint: Path, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("dora", "everything", "embeddings-dora")
    folders = {name: make_feature(tmp_path / name, checkpoint, name, seed) for seed, name in enumerate(names)}
    asked: list[object] = []
    read = decoder.weight_rows
    monkeypatch.setattr(decoder, "weight_rows", lambda *which: asked.append(which) or read(*which))
    # Room for one or two of them at a time, in both memories.
    sizes = [
        4 * sources(decoder).source(read_adapter(folder, decoder.base_shape)).layout.num_elements
        for folder in folders.values()
    ]
    room = max(sizes) + 4096
    assert sum(sizes) > room
    engine = real_engine(decoder, folders, adapter_bytes=room, host_adapter_bytes=room)
    params = SamplingParams(max_tokens=4, temperature=0.0, num_logprobs=5, ignore_eos=True)
    prompt = (104, 7, 50, 100, 9)

    def answers() -> dict[str, list[int]]:
        found = {}
        for name in names:
            collected = run(engine, [Request(name, prompt, params, name)])[name]
            assert collected.last.failure is None, collected.last.failure
            found[name] = collected.token_ids
        return found

    first = answers()
    num_asked = len([which for which in asked if which[0] not in (EMBED, HEAD)])  # type: ignore[index]
    assert answers() == first
    assert len([which for which in asked if which[0] not in (EMBED, HEAD)]) == num_asked > 0  # type: ignore[index]
    engine.close()


def test_a_base_that_is_not_at_hand_is_said(decoder: Decoder) -> None:
    without = ImageSources(decoder.base_shape, decoder.dtype, rank_major=True, rescale_on_device=False)
    weights = replace(AdapterWeights({}), whole={FINAL_NORM: torch.ones(HIDDEN)})
    with pytest.raises(UnsupportedAdapter, match="base is not at hand"):
        without.source(weights)
