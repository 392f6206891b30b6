"""How a stored adapter's bytes become an image: which go straight to their place, which are converted on the way.

One system call reads many tensors to as many places (``preadv``), without the interpreter's lock, so that the steps
that go on meanwhile do not notice. Tensors that the image holds as the file does are read into the image itself; others
(another dtype, a padded rank, a transposed B, a scaling that is folded in here) pass through a buffer.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from loraplex_adapters.base import ModuleKey
from loraplex_adapters.errors import InvalidAdapter
from loraplex_adapters.format import AdapterLayout as FileLayout
from loraplex_server.engine.adapter_image import AdapterLayout, PartPlace, Rescale
from loraplex_server.model.adapters import GROUPS

_DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# One batch is one system call in one thread. Linux takes 1,024 places in a call.
_BATCH_BYTES = 6 * 2**20
_BATCH_READS = 512
_BUFFER_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Read:
    """One tensor [rows, columns] of the file, at bytes ``begin`` to ``end``.

    It goes to ``offset`` of the image, in elements, with these strides; ``direct`` if its bytes are the image's.
    """

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: int
    strides: tuple[int, int]
    scaling: float
    direct: bool

    def convert(self, raw: Tensor, data: Tensor) -> None:
        """Bring bytes read from the file, ``raw``, to their place in the image."""
        source = raw.view(self.dtype).view(self.shape)
        target = data.as_strided(self.shape, self.strides, data.storage_offset() + self.offset)
        target.copy_(source if self.scaling == 1 else source.float() * self.scaling)


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """All reads of one file, in batches that lie in one piece of it; and what is left for the device to multiply."""

    layout: AdapterLayout
    batches: tuple[tuple[Read, ...], ...]
    rescales: tuple[Rescale, ...]

    def read(self, path: Path, data: Tensor, threads: Executor) -> None:
        """Fill ``data`` [num_elements] from the file. Raises InvalidAdapter if it has become shorter, OSError."""
        if self.layout.padded:
            data.zero_()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            image = data.view(torch.uint8).numpy().data
            reading = [threads.submit(_read_batch, descriptor, batch, data, image) for batch in self.batches]
            wait(reading)  # all of them, or one that still runs would read from whatever is opened next
        finally:
            os.close(descriptor)
        for batch in reading:
            batch.result()


def plan_reads(file: FileLayout, layout: AdapterLayout, dtype: torch.dtype, *, rescale_on_device: bool) -> ReadPlan:
    """Plan how a file with this layout becomes an image of ``dtype``."""
    reads = []
    unscaled: dict[tuple[str, float, int], list[int]] = defaultdict(list)
    places = _places(file, layout)
    for module in file.modules:
        part, a_offset, k = places[module]
        scaling = file.scalings[module]
        n, rank = part.col_stop - part.col_start, file.rank(module)
        (_, a), (_, b) = file.tensors[module, "A"], file.tensors[module, "B"]
        reads.append(
            Read(a.begin, a.end, _DTYPES[a.dtype], (rank, k), a_offset, (k, 1), 1.0, _DTYPES[a.dtype] is dtype)
        )
        keeps_form = _DTYPES[b.dtype] is dtype and rank == part.rank and not layout.rank_major
        direct = keeps_form and (scaling == 1 or rescale_on_device)
        if direct and scaling != 1:
            unscaled[module[1], scaling, n * rank].append(part.offset)
        strides = (1, n) if layout.rank_major else (part.rank, 1)
        reads.append(Read(b.begin, b.end, _DTYPES[b.dtype], (n, rank), part.offset, strides, scaling, direct))
    # Layers that are alike lie at equal distances: a run or two for each linear's name.
    rescales = tuple(
        Rescale(*run, scaling)
        for (_, scaling, size), offsets in unscaled.items()
        for run in _progressions(sorted(offsets), size)
    )
    return ReadPlan(layout, tuple(_batches(sorted(reads, key=lambda read: read.begin))), rescales)


def _places(file: FileLayout, layout: AdapterLayout) -> Mapping[ModuleKey, tuple[PartPlace, int, int]]:
    """By module: where its B lies, where its rows of A begin, and how long they are."""
    present = set(file.modules)
    found: dict[ModuleKey, tuple[PartPlace, int, int]] = {}
    for (layer, group), place in layout.groups.items():
        members = [member for member in GROUPS[group] if (layer, member) in present]
        for member, part in zip(members, place.parts, strict=True):
            found[layer, member] = (part, place.offset + part.rank_start * place.k, place.k)
    return found


def _batches(reads: Sequence[Read]) -> list[tuple[Read, ...]]:
    batches: list[list[Read]] = []
    size = 0
    for read in reads:
        follows = batches and batches[-1][-1].end == read.begin
        if not follows or size + read.end - read.begin > _BATCH_BYTES or len(batches[-1]) == _BATCH_READS:
            batches.append([])
            size = 0
        batches[-1].append(read)
        size += read.end - read.begin
    return [tuple(batch) for batch in batches]


def _progressions(offsets: list[int], size: int) -> list[tuple[int, int, int, int]]:
    """(first, size, distance, count) of runs of equal distance."""
    runs: list[tuple[int, int, int, int]] = []
    for offset in offsets:
        if runs:
            first, _, distance, count = runs[-1]
            if count == 1 or offset - first == distance * count:
                runs[-1] = (first, size, offset - first if count == 1 else distance, count + 1)
                continue
        runs.append((offset, size, size, 1))
    return runs


def _read_batch(descriptor: int, batch: Sequence[Read], data: Tensor, image: memoryview) -> None:
    width = data.element_size()
    num_buffered, starts = 0, []
    for read in batch:
        starts.append(num_buffered)
        if not read.direct:
            num_buffered += -(-(read.end - read.begin) // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT
    buffer = torch.empty(num_buffered, dtype=torch.uint8)
    buffered = buffer.numpy().data
    views = []
    for read, start in zip(batch, starts, strict=True):
        target, at = (image, read.offset * width) if read.direct else (buffered, start)
        views.append(target[at : at + read.end - read.begin])
    _read_all(descriptor, views, batch[0].begin)
    for read, start in zip(batch, starts, strict=True):
        if not read.direct:
            read.convert(buffer[start : start + read.end - read.begin], data)


def _read_all(descriptor: int, views: list[memoryview], begin: int) -> None:
    """Fill all views from ``begin`` on, however little each call brings."""
    while views:
        num_read = os.preadv(descriptor, views, begin)
        if num_read == 0:
            raise InvalidAdapter("the adapter's file has become shorter since it came in.", code="weights_broken")
        begin += num_read
        done = 0
        while done < len(views) and num_read >= len(views[done]):
            num_read -= len(views[done])
            done += 1
        views = views[done:]
        if num_read:
            views[0] = views[0][num_read:]
