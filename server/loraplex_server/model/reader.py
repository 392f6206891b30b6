"""Brings a checkpoint's tensors to the device one by one, reading the next while the last is used."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final

import torch
from torch import Tensor

from loraplex_server.model.checkpoint import Checkpoint, TensorEntry
from loraplex_server.model.errors import BadCheckpoint

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total) as loading goes on."""

_CHUNK_BYTES: Final = 32 * 2**20
_NUM_READERS: Final = 8


class TensorReader:
    """Reads tensors in a given order, one ahead of the caller; never more than two are in flight.

    To a GPU the bytes go through pinned buffers in chunks, so that file reads, copies and the caller's quantization
    overlap. Use as a context manager.
    """

    def __init__(
        self, checkpoint: Checkpoint, names: Sequence[str], device: torch.device, progress: Progress | None = None
    ) -> None:
        self._entries = {name: checkpoint.entries[name] for name in names}
        self._order: Iterator[str] = iter(names)
        self._device = device
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = sum(entry.num_bytes for entry in self._entries.values())
        self._stack = ExitStack()
        self._ahead = self._stack.enter_context(ThreadPoolExecutor(1, "tensor-ahead"))
        self._readers = self._stack.enter_context(ThreadPoolExecutor(_NUM_READERS, "tensor-read"))
        self._files: dict[str, int] = {}
        self._next: tuple[str, Future[Tensor]] | None = None
        self._read_ahead()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for descriptor in self._files.values():
            os.close(descriptor)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def take(self, name: str) -> Tensor:
        """The next tensor, on the device; ``name`` must be the next of the order. Raises: BadCheckpoint."""
        assert self._next is not None
        expected, future = self._next
        assert name == expected, f"{name} taken before {expected}"
        tensor = future.result()
        self._read_ahead()
        self._done_bytes += self._entries[name].num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
        return tensor

    def _read_ahead(self) -> None:
        name = next(self._order, None)
        self._next = None if name is None else (name, self._ahead.submit(self._read, self._entries[name]))

    def _read(self, entry: TensorEntry) -> Tensor:
        descriptor = self._files.get(str(entry.file))
        if descriptor is None:
            descriptor = self._files[str(entry.file)] = os.open(entry.file, os.O_RDONLY)
        out = torch.empty(entry.num_bytes, dtype=torch.uint8, device=self._device)

        def read_chunk(start: int) -> None:
            target = out[start : start + _CHUNK_BYTES]
            staged = target if target.is_cpu else torch.empty_like(target, device="cpu", pin_memory=True)
            _fill(descriptor, staged, entry.offset + start)
            if staged is not target:
                target.copy_(staged, non_blocking=True)

        starts = range(0, entry.num_bytes, _CHUNK_BYTES)
        if len(starts) == 1:
            read_chunk(0)
        else:
            list(self._readers.map(read_chunk, starts))
        return out.view(entry.dtype).view(entry.shape)


def _fill(descriptor: int, target: Tensor, offset: int) -> None:
    """Read exactly ``target``'s bytes at ``offset``."""
    view, done = target.numpy().data, 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise BadCheckpoint("a checkpoint file ended before its tensors did; was it changed while it was read?")
        done += count
