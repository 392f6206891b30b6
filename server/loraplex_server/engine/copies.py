"""Copies of adapters from disk to host and from host to device, on threads of their own (and, on a GPU, a stream).

Everything here keeps out of the steps' way: files are read and copies waited for without the interpreter's lock.
"""

import os
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.adapter_image import AdapterImage
from loraplex_server.engine.epilogue import BaseWeights
from loraplex_server.engine.host_memory import HostBlock, Segment
from loraplex_server.engine.image_source import ImageSource, ImageSources, OpenAdapter
from loraplex_server.engine.messages import AdapterLoad, Failure

Owner = TypeVar("Owner")

# Adapters read at once, and threads that they share for it.
NUM_READS: Final = 2
_READ_THREADS: Final = max(1, min(8, (os.cpu_count() or 1) // 2))
# Takes 160 us on the bus. Even 80 MiB in one piece lengthen no step by more than 3 %; this is what a step's own few bytes
# may have to wait for at worst.
_PIECE_BYTES: Final = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Landed(Generic[Owner]):
    """Something that has ended, for the one who asked for it: a source was found, an image made, or it was copied."""

    owner: Owner
    load: AdapterLoad | None = None
    source: ImageSource | None = None
    image: AdapterImage | None = None
    failure: Failure | None = None


class Copies(Generic[Owner]):
    """Runs copies and keeps their outcomes until ``landed`` takes them; ``wake`` is called after each."""

    def __init__(
        self,
        *,
        open_adapter: OpenAdapter,
        base: BaseShape,
        dtype: torch.dtype,
        device: torch.device,
        wake: Callable[[], None],
        weights: BaseWeights | None = None,
    ) -> None:
        on_gpu = device.type == "cuda"
        self._open = open_adapter
        self._device = device
        self._wake = wake
        self._sources = ImageSources(
            base,
            dtype,
            rank_major=not on_gpu,
            rescale_on_device=on_gpu,
            weights=weights,
            stream=torch.cuda.Stream(device) if on_gpu else None,  # type: ignore[no-untyped-call]
        )
        self._outcomes: queue.SimpleQueue[Landed[Owner]] = queue.SimpleQueue()
        self._finder = ThreadPoolExecutor(1, thread_name_prefix="adapter-find")
        self._makers = ThreadPoolExecutor(NUM_READS, thread_name_prefix="adapter-make")
        self._readers = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="adapter-read")
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="adapter-send")
        self._memory = ThreadPoolExecutor(1, thread_name_prefix="adapter-memory")
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def find(self, owner: Owner, digest: str) -> None:
        """Find out what an adapter's image is made from, and how large it will be."""
        self._submit(
            self._finder, owner, lambda: Landed(owner, source=self._sources.source(self._open(digest), digest))
        )

    def to_host(self, owner: Owner, digest: str, source: ImageSource, block: HostBlock) -> None:
        """Make an adapter's image in ``block``."""
        self._submit(self._makers, owner, lambda: self._to_host(owner, digest, source, block))

    def to_device(
        self, owner: Owner, digest: str, image: AdapterImage, target: Tensor, free_since: torch.cuda.Event | None
    ) -> None:
        """Copy an image into ``target``, which steps up to ``free_since`` may still read."""
        self._submit(self._sender, owner, lambda: self._to_device(owner, digest, image, target, free_since))

    def make_memory(self, segment: Segment) -> None:
        """Have a piece of host memory made, so that nobody waits for it later."""
        self._memory.submit(segment.data)

    def landed(self) -> Iterator[Landed[Owner]]:
        """What has ended since the last call."""
        while True:
            try:
                yield self._outcomes.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        for pool in (self._finder, self._makers, self._sender, self._readers, self._memory):
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, owner: Owner, work: Callable[[], Landed[Owner]]) -> None:
        def run() -> None:
            try:
                outcome = work()
            except Exception as error:  # whatever it is, those who wait must hear of it
                outcome = Landed(owner, failure=Failure("adapter_load_failed", f"{error}"))
            self._outcomes.put(outcome)
            self._wake()

        pool.submit(run)

    def _to_host(self, owner: Owner, digest: str, source: ImageSource, block: HostBlock) -> Landed[Owner]:
        started = time.perf_counter()
        image = source.image(block.tensor(source.layout.num_elements), self._readers)
        seconds = time.perf_counter() - started
        return Landed(owner, AdapterLoad(digest, "disk_to_host", seconds, image.num_bytes), image=image)

    def _to_device(
        self, owner: Owner, digest: str, image: AdapterImage, target: Tensor, free_since: torch.cuda.Event | None
    ) -> Landed[Owner]:
        started = time.perf_counter()
        target = target[: image.data.numel()]
        if self._stream is None:
            target.copy_(image.data)
            for rescale in image.rescales:
                rescale.apply(target)
        else:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                if free_since is not None:
                    self._stream.wait_event(free_since)
                _send(image.data, target)
                for rescale in image.rescales:
                    rescale.apply(target)
            self._stream.synchronize()
        load = AdapterLoad(digest, "host_to_gpu", time.perf_counter() - started, image.num_bytes)
        return Landed(owner, load)


def _send(source: Tensor, target: Tensor) -> None:
    piece = _PIECE_BYTES // source.element_size()
    for begin in range(0, source.numel(), piece):
        target[begin : begin + piece].copy_(source[begin : begin + piece], non_blocking=True)
