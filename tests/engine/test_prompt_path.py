"""The fused pass of prompts against the plain one: any mix of adapters, prompts in one piece or in several."""

from tests.kernels.triton_support import DEVICE, assert_close

# isort: split
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loraplex_adapters.format import read
from loraplex_server.engine.adapter_image import AdapterImage, build_image
from loraplex_server.engine.device_adapters import DeviceAdapters
from loraplex_server.engine.prompt_path import PromptPath
from loraplex_server.engine.runner import build_batch
from loraplex_server.engine.scheduler import Chunk, Plan
from loraplex_server.engine.sequence import Sequence
from loraplex_server.kernels.lora_ref import GroupDelta
from loraplex_server.model.adapters import OutsideParts
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.kv_cache import KVCache
from loraplex_server.model.loader import load
from tests.engine.support import make_sequence
from tests.models import make_adapter, make_checkpoint

BLOCK_SIZE, NUM_BLOCKS = 8, 64
RANKS = (8, 24, 3)
# The last adapter is one that the tables have no room for.
NUM_TABLED = 2


class Images:
    """The adapters' factors, by slot."""

    def __init__(self, images: list[AdapterImage]) -> None:
        self._deltas: list[Mapping[tuple[int, str], GroupDelta]] = []
        for image in images:
            self._deltas.append(image.layout.deltas(image.data.to(DEVICE)))

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        return self._deltas[slot].get((layer, group))

    def outside(self, slot: int) -> OutsideParts | None:
        return None


class Bench:
    """One decoder with adapters, and both passes over caches of their own."""

    def __init__(self, folder: Path, family: str) -> None:
        checkpoint = make_checkpoint(folder / "base", family)
        self.decoder: Decoder = load(checkpoint, device=DEVICE, dtype=torch.float32, quantization="none")
        base, images = self.decoder.base_shape, []
        for i, rank in enumerate(RANKS):
            weights = read(make_adapter(folder / str(i), checkpoint, seed=i, rank=rank), base)
            images.append(build_image(weights, base, torch.float32, pinned=False))
        self.lookup = Images(images)
        arena = torch.cat([image.data for image in images]).to(DEVICE)
        tables, start = DeviceAdapters(base, arena, max_rows=4, fuses=False), 0
        for slot, image in enumerate(images[:NUM_TABLED]):
            tables.place(slot, start, image.layout)
            start += image.data.numel()
        self.plain, kv = self.cache(), self.cache()
        self.path = PromptPath(self.decoder, kv, tables, self.lookup, max_tokens=256)

    def cache(self) -> KVCache:
        spec = self.decoder.spec
        return KVCache.allocate(
            num_layers=spec.num_layers,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=torch.float32,
            device=DEVICE,
        )

    def compare(self, chunks: list[Chunk]) -> None:
        batch = build_batch(Plan(tuple(chunks)), BLOCK_SIZE, DEVICE)
        expected = self.decoder.forward(batch, self.plain, self.lookup)
        assert_close(self.path.start(batch).finish(), expected)


def sequences(lengths: Mapping[int, int]) -> list[Sequence]:
    """A sequence for every slot (-1: the base) of so many tokens, with blocks of its own."""
    made, free = [], iter(range(1, NUM_BLOCKS))
    for slot, length in sorted(lengths.items()):
        seq = make_sequence(f"s{slot}", length)
        seq.tokens = [(7 * i + slot) % 256 for i in range(length)]
        seq.slot = slot
        seq.block_ids = [next(free) for _ in range(-(-length // BLOCK_SIZE))]
        made.append(seq)
    return made


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(
    "lengths",
    [{-1: 20}, {0: 70}, {-1: 9, 0: 33, 1: 66}, {1: 5, 2: 11}],
    ids=["base", "one-adapter", "mixed", "without-a-table"],
)
def test_whole_prompts(bench: Bench, lengths: dict[int, int]) -> None:
    bench.compare([Chunk(seq, 0, len(seq.tokens)) for seq in sequences(lengths)])


def test_prompts_in_pieces_beside_rows_that_decode(bench: Bench) -> None:
    seqs = sequences({-1: 30, 0: 45, 1: 20})
    bench.compare([Chunk(seq, 0, len(seq.tokens) // 2) for seq in seqs])
    bench.compare([Chunk(seq, len(seq.tokens) // 2, 1 if seq.slot == 0 else 9) for seq in seqs])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_step_takes_no_memory_that_grows_with_its_tokens(bench: Bench) -> None:
    chunks = [Chunk(seq, 0, len(seq.tokens)) for seq in sequences({-1: 60, 0: 90, 1: 100})]
    batch = build_batch(Plan(tuple(chunks)), BLOCK_SIZE, DEVICE)
    bench.path.start(batch).finish()  # kernels are compiled, and cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, taken = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["num_device_alloc"]
    bench.path.start(batch).finish()
    # The smallest activation of these 250 rows has 64 kB.
    assert torch.cuda.max_memory_allocated() - held <= 16 << 10
    assert torch.cuda.memory_stats()["num_device_alloc"] == taken
