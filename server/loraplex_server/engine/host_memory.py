"""Host memory for adapter images: taken from the system in large pieces that stay, so that a load allocates nothing.

On a GPU it is page-locked. Locking a fresh piece holds up launches on every thread (an adapter's 84 MB: up to 90 ms in
pages of 4 KB, 5 ms in large pages), so pieces are made of large pages, ahead of their use, and kept.
"""

import ctypes
import mmap
import threading
import weakref
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loraplex_server.engine.extents import Extent, Extents

SEGMENT_BYTES: Final = 256 * 2**20
# Locking a segment holds up whatever is launched meanwhile for some 16 ms. So a quarter of the limit, up to this, is locked
# before there are requests, and then a little more whenever what is left would not last for long.
_FIRST_BYTES: Final = 8 * 2**30
_NUM_LEFT: Final = 2


class Segment(Extents):
    """One piece. Its memory comes into being when it is first asked for, on whatever thread that is."""

    def __init__(self, num_elements: int, dtype: torch.dtype, *, pinned: bool) -> None:
        super().__init__(num_elements)
        self._dtype = dtype
        self._pinned = pinned
        self._data: Tensor | None = None
        self._lock = threading.Lock()

    def data(self) -> Tensor:
        with self._lock:
            if self._data is None:
                make = _pinned if self._pinned else torch.empty
                self._data = make(self.num_elements, dtype=self._dtype)
            return self._data


@dataclass(frozen=True, slots=True)
class HostBlock:
    """Room for one image."""

    segment: Segment
    extent: Extent

    def tensor(self, num_elements: int) -> Tensor:
        """The memory itself. For the threads that copy: the first call in a piece may have to make it."""
        return self.segment.data()[self.extent.start : self.extent.start + num_elements]


class HostMemory:
    """At most ``num_bytes`` of memory in segments. Owned by the engine's thread, but for the memory itself."""

    def __init__(self, num_bytes: int, dtype: torch.dtype, *, pinned: bool) -> None:
        self._limit = num_bytes // dtype.itemsize
        self._dtype = dtype
        self._pinned = pinned
        self._segments: list[Segment] = []

    def take(self, num_elements: int, *, beyond_limit: bool = False) -> HostBlock | None:
        """Room for an image; None if there is none now. ``beyond_limit``: in a segment of its own if need be."""
        for segment in self._segments:
            extent = segment.allocate(num_elements)
            if extent is not None:
                return HostBlock(segment, extent)
        size = Extents.rounded(num_elements)
        room = self._limit - sum(segment.num_elements for segment in self._segments if not segment.is_empty)
        if room < size and not beyond_limit:
            return None
        if self._num_left < size:
            # Those that are empty are too small for this image, and make way for one that is not.
            self._segments = [segment for segment in self._segments if not segment.is_empty]
        segment = self._add(size)
        extent = segment.allocate(num_elements)
        assert extent is not None
        return HostBlock(segment, extent)

    def give(self, block: HostBlock) -> None:
        """The block's image is not needed any more. Memory beyond the limit goes back to the system."""
        block.segment.free(block.extent)
        if block.segment.is_empty and self._num_left < 0:
            self._segments.remove(block.segment)

    def spares(self) -> list[Segment]:
        """New segments, where few are left that are empty; their memory should be made before an image needs it."""
        usual = SEGMENT_BYTES // self._dtype.itemsize
        num_empty = sum(segment.is_empty for segment in self._segments)
        wanted = _NUM_LEFT if self._pinned else 1
        if self._pinned and not self._segments:
            wanted = max(wanted, min(_FIRST_BYTES, self._limit * self._dtype.itemsize // 4) // SEGMENT_BYTES)
        return [self._add(1) for _ in range(min(wanted - num_empty, max(self._num_left, 0) // usual))]

    @property
    def _num_left(self) -> int:
        return self._limit - sum(segment.num_elements for segment in self._segments)

    def _add(self, at_least: int) -> Segment:
        usual = min(SEGMENT_BYTES // self._dtype.itemsize, self._num_left)
        segment = Segment(max(at_least, usual), self._dtype, pinned=self._pinned)
        self._segments.append(segment)
        return segment


def _pinned(num_elements: int, *, dtype: torch.dtype) -> Tensor:
    """Page-locked memory in large pages, where the system has them; from torch where it cannot be had so."""
    pages = mmap.mmap(-1, num_elements * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(pages, dtype=dtype)
    # Brought in before they are locked, by one thread and without the interpreter's lock: nobody waits for this.
    ctypes.memset(data.data_ptr(), 0, data.nbytes)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, size = data.data_ptr(), data.nbytes
    if int(runtime.cudaHostRegister(address, size, 0)) != 0:
        return torch.empty(num_elements, dtype=dtype, pin_memory=True)
    weakref.finalize(data, runtime.cudaHostUnregister, address).atexit = False
    return data
