"""Adapters on their way through page-locked memory to a GPU."""

from pathlib import Path

import pytest
import torch

from loraplex_adapters.format import AdapterWeights, LoraFactors, write
from loraplex_adapters.stored import StoredLayouts
from loraplex_server.engine.adapter_image import build_image
from loraplex_server.engine.host_memory import HostMemory
from loraplex_server.engine.residency import AdapterResidency, Limits
from tests.engine.support import BASE, random_weights, settle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")


def test_host_memory_is_page_locked() -> None:
    host = HostMemory(1 << 24, torch.bfloat16, pinned=True)
    block = host.take(1 << 20)
    assert block is not None
    memory = block.tensor(1 << 20)
    assert memory.is_pinned()
    assert memory.copy_(torch.arange(1 << 20) % 251).to(CUDA, non_blocking=True).sum().isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_arrives_as_its_factors_would_and_survives_compaction(tmp_path: Path, dtype: torch.dtype) -> None:
    ranks = {"a": 8, "b": 24, "c": 8, "d": 12, "late": 16}
    for seed, (name, rank) in enumerate(ranks.items()):
        weights = random_weights({(i, linear): rank for i in range(2) for linear in BASE.linears}, seed, 0.3)
        # As files mostly come: in the engine's own precision, so that most of them is read straight to its place.
        factors = {
            module: LoraFactors(f.a.to(dtype), f.b.to(dtype), f.scaling) for module, f in weights.factors.items()
        }
        write(tmp_path / name, AdapterWeights(factors))
    layouts = StoredLayouts()
    images = {
        name: build_image(layouts.locate(tmp_path / name).weights(), BASE, torch.bfloat16, pinned=False)
        for name in ranks
    }
    room = sum(image.num_bytes + 512 for name, image in images.items() if name != "late")
    residency = AdapterResidency(
        open_adapter=lambda digest: layouts.locate(tmp_path / digest),
        base=BASE,
        limits=Limits(room, 1 << 24),
        dtype=torch.bfloat16,
        device=CUDA,
    )

    def bring(name: str) -> int:
        residency.prefetch(name)
        settle(residency)
        slot = residency.acquire(name)
        assert slot is not None
        return slot

    slots = {name: bring(name) for name in "abcd"}
    for name in "ac":
        residency.release(name)
        slots.pop(name)
    residency.expose()
    # Room for it there is only once b has moved.
    slots["late"] = bring("late")
    for name, slot in slots.items():
        for (layer, group), expected in images[name].layout.deltas(images[name].data).items():
            delta = residency.delta(slot, layer, group)
            assert delta is not None
            assert torch.equal(delta.a.cpu(), expected.a)
            for part, wanted in zip(delta.parts, expected.parts, strict=True):
                assert torch.equal(part.b.cpu(), wanted.b)
    residency.close()
