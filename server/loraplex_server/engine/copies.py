"""Copies of adapters from disk to host and from host to device, on threads of their own (and, on a GPU, a stream)."""

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_adapters.format import AdapterWeights
from loraplex_server.engine.adapter_image import AdapterImage, build_image
from loraplex_server.engine.messages import AdapterLoad, Failure

OpenAdapter = Callable[[str], AdapterWeights]
Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True)
class Landed(Generic[Owner]):
    """A copy that has ended, for the one who asked for it. ``image`` comes from disk-to-host copies."""

    owner: Owner
    load: AdapterLoad | None = None
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
    ) -> None:
        self._open = open_adapter
        self._base = base
        self._dtype = dtype
        self._device = device
        self._wake = wake
        self._outcomes: queue.SimpleQueue[Landed[Owner]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="adapter-copy")
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def to_host(self, owner: Owner, digest: str) -> None:
        """Read an adapter and pack its image."""
        self._threads.submit(self._to_host, owner, digest)

    def to_device(self, owner: Owner, digest: str, image: AdapterImage, target: Tensor) -> None:
        """Copy an image into ``target``, which steps that the device has not finished yet may still read."""
        after = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        self._threads.submit(self._to_device, owner, digest, image, target, after)

    def landed(self) -> Iterator[Landed[Owner]]:
        """The copies that have ended since the last call."""
        while True:
            try:
                yield self._outcomes.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _to_host(self, owner: Owner, digest: str) -> None:
        started = time.perf_counter()
        try:
            on_gpu = self._device.type == "cuda"
            weights = self._open(digest)
            image = build_image(weights, self._base, self._dtype, pinned=on_gpu, rank_major=not on_gpu)
        except Exception as error:  # any failure is this adapter's alone and is reported to its requests
            self._outcomes.put(Landed(owner, failure=Failure("adapter_load_failed", f"{error}")))
        else:
            load = AdapterLoad(digest, "disk_to_host", time.perf_counter() - started, image.num_bytes)
            self._outcomes.put(Landed(owner, load, image))
        self._wake()

    def _to_device(
        self, owner: Owner, digest: str, image: AdapterImage, target: Tensor, after: torch.cuda.Event | None
    ) -> None:
        started = time.perf_counter()
        try:
            target = target[: image.data.numel()]
            if self._stream is None or after is None:
                target.copy_(image.data)
            else:
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(after)
                    target.copy_(image.data, non_blocking=True)
                self._stream.synchronize()
        except Exception as error:  # as above
            self._outcomes.put(Landed(owner, failure=Failure("adapter_load_failed", f"{error}")))
        else:
            load = AdapterLoad(digest, "host_to_gpu", time.perf_counter() - started, image.num_bytes)
            self._outcomes.put(Landed(owner, load))
        self._wake()
