"""Many adapters from few files: thousands of them would fill the disk, and their values do not matter for speed."""

from pathlib import Path

from loraplex_adapters.format import write
from loraplex_adapters.stored import StoredAdapter, StoredLayouts
from loraplex_server.bench.checkpoint import random_adapter
from loraplex_server.bench.rig import LoadedBase


class AdapterLibrary:
    """Adapters of several ranks below ``folder``. ``name(rank, i)`` and ``name(rank, j)`` are two adapters to the engine,
    each in memory of its own, but their bytes come from the same file where i and j are equal modulo ``num_files``."""

    def __init__(self, folder: Path, base: LoadedBase, ranks: tuple[int, ...], *, num_files: int, seed: int) -> None:
        self._folder = folder
        self._num_files = num_files
        self._layouts = StoredLayouts()
        for rank in ranks:
            for i in range(num_files):
                weights = random_adapter(base.decoder.base_shape, rank=rank, seed=seed + i)
                write(self._directory(rank, i), weights, base_model_name=base.choice.shape)

    def name(self, rank: int, index: int) -> str:
        return f"{rank}/{index}"

    def open(self, name: str) -> StoredAdapter:
        """What the engine opens adapters with."""
        rank, index = map(int, name.split("/"))
        return self._layouts.locate(self._directory(rank, index % self._num_files))

    def _directory(self, rank: int, file: int) -> Path:
        return self._folder / f"rank{rank}" / str(file)
