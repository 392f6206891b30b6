"""Where each adapter is: on disk, in (pinned) host memory, on the device; and how it gets there.

Copies run beside the step loop (``engine.copies``), so a load never blocks it and a request waits only for its own
adapter. All state here belongs to the engine's thread; ``poll`` takes in what has been copied once a step.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.adapter_image import AdapterImage, AdapterLayout
from loraplex_server.engine.arena import Arena, Extent
from loraplex_server.engine.copies import Copies, Landed, OpenAdapter
from loraplex_server.engine.messages import AdapterLoad, Failure, Residency
from loraplex_server.engine.slots import Slots
from loraplex_server.kernels.lora_ref import GroupDelta


class AdapterLoadError(Exception):
    """An adapter cannot be brought to the device; ``failure`` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class _Phase(Enum):
    STILL = "still"
    TO_HOST = "to_host"
    TO_DEVICE = "to_device"


@dataclass(slots=True, eq=False)
class _Entry:
    digest: str
    phase: _Phase = _Phase.STILL
    image: AdapterImage | None = None
    layout: AdapterLayout | None = None
    extent: Extent | None = None
    slot: int = -1
    num_users: int = 0
    pinned: bool = False
    # It came in since requests were last admitted: evicted now, it would have been loaded for nobody.
    fresh: bool = False
    failure: Failure | None = None

    @property
    def resident(self) -> bool:
        return self.slot >= 0


class SlotTables(Protocol):
    """What is told of every resident adapter's place: its slot, its first element in the arena, its layout."""

    def place(self, slot: int, start: int, layout: AdapterLayout) -> None: ...
    def forget(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that adapters may take on the device and in host memory."""

    device_bytes: int
    host_bytes: int


class AdapterResidency:
    """Brings adapters to the device on demand, keeps the recently used, and holds those in use or pinned."""

    def __init__(
        self,
        *,
        open_adapter: OpenAdapter,
        base: BaseShape,
        limits: Limits,
        dtype: torch.dtype,
        device: torch.device,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._limits = limits
        self._dtype = dtype
        self._arena = Arena(max(limits.device_bytes // dtype.itemsize, 1), dtype, device)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._deltas: dict[int, Mapping[tuple[int, str], GroupDelta]] = {}
        self._wanted: set[str] = set()
        self._fresh: list[_Entry] = []
        self._num_copying = 0
        self._host_bytes = 0
        self._slots = Slots()
        # Where kernels find the factors; set where there are such kernels.
        self.tables: SlotTables | None = None
        self._copies: Copies[_Entry] = Copies(
            open_adapter=open_adapter, base=base, dtype=dtype, device=device, wake=wake
        )

    # --- the model's side -------------------------------------------------------------------------------------------

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        return self._deltas[slot].get((layer, group))

    # --- the scheduler's side ---------------------------------------------------------------------------------------

    def prefetch(self, digest: str) -> None:
        """Start bringing an adapter to the device if it is not there or on its way."""
        self._want(self._touch(digest))

    def acquire(self, digest: str) -> int | None:
        """Hold an adapter for one sequence: its slot, or None while it is on its way or has no room.

        Raises: AdapterLoadError if it could not be loaded; the next call tries again.
        """
        entry = self._touch(digest)
        if entry.failure is not None:
            failure, entry.failure = entry.failure, None
            self._forget_if_empty(entry)
            raise AdapterLoadError(failure)
        if not entry.resident:
            self._want(entry)
            return None
        entry.num_users += 1
        entry.fresh = False
        return entry.slot

    def release(self, digest: str) -> None:
        """One sequence fewer uses the adapter."""
        entry = self._entries[digest]
        assert entry.num_users > 0
        entry.num_users -= 1

    def pin(self, digest: str, pinned: bool) -> None:
        """A pinned adapter stays on the device once it is there."""
        entry = self._touch(digest)
        entry.pinned = pinned
        self._forget_if_empty(entry)

    def drop(self, digest: str) -> int | None:
        """Free every tier of an adapter: the bytes given back, or None while it is in use or being copied."""
        entry = self._entries.get(digest)
        if entry is None:
            return 0
        if entry.num_users > 0 or entry.phase is not _Phase.STILL:
            return None
        entry.pinned = False
        freed = self._drop_image(entry) + self._evict(entry)
        self._wanted.discard(digest)
        self._entries.pop(digest, None)
        return freed

    def poll(self) -> list[AdapterLoad]:
        """Take in what the copying threads have finished, and start what can follow."""
        loads = []
        for landed in self._copies.landed():
            if landed.load is not None:
                loads.append(landed.load)
            self._take_in(landed)
        for digest in list(self._wanted):
            self._advance(self._entries[digest])
        return loads

    def expose(self) -> None:
        """All who waited for what has landed have been served: it may be evicted like any other again.

        Without this pause two adapters that need the same room would push each other out for ever.
        """
        for entry in self._fresh:
            entry.fresh = False
        self._fresh.clear()

    @property
    def arena(self) -> Tensor:
        """The device memory that all resident adapters lie in."""
        return self._arena.data

    # --- what is where ----------------------------------------------------------------------------------------------

    @property
    def bytes_used(self) -> int:
        return self._arena.num_used * self._dtype.itemsize

    @property
    def bytes_total(self) -> int:
        return self._arena.num_elements * self._dtype.itemsize

    @property
    def host_bytes_used(self) -> int:
        return self._host_bytes

    @property
    def num_copies_running(self) -> int:
        return self._num_copying

    def known(self) -> list[str]:
        return list(self._entries)

    def where(self, digest: str) -> tuple[Residency, int, bool]:
        """Tier, bytes and whether it is pinned."""
        entry = self._entries.get(digest)
        if entry is None:
            return "disk", 0, False
        tier: Residency = "gpu" if entry.resident else "host" if entry.image else "disk"
        num_bytes = entry.layout.num_elements * self._dtype.itemsize if entry.layout else 0
        return tier, num_bytes, entry.pinned

    def is_resident(self, digest: str) -> bool:
        entry = self._entries.get(digest)
        return entry is not None and entry.resident

    def is_settled(self, digest: str) -> bool:
        """Whether ``acquire`` would say something new: it is resident, or its load failed."""
        entry = self._entries.get(digest)
        return entry is not None and (entry.resident or entry.failure is not None)

    def take_failure(self, digest: str) -> Failure | None:
        """The failure of the last load, once."""
        entry = self._entries.get(digest)
        if entry is None or entry.failure is None:
            return None
        failure, entry.failure = entry.failure, None
        self._forget_if_empty(entry)
        return failure

    def close(self) -> None:
        self._copies.close()

    # --- moving -----------------------------------------------------------------------------------------------------

    def _touch(self, digest: str) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = _Entry(digest)
        else:
            self._entries.move_to_end(digest)
        return entry

    def _want(self, entry: _Entry) -> None:
        if not entry.resident and entry.failure is None:
            self._wanted.add(entry.digest)
            self._advance(entry)

    def _advance(self, entry: _Entry) -> None:
        if entry.resident or entry.phase is not _Phase.STILL or entry.failure is not None:
            return
        if entry.image is None:
            entry.phase = _Phase.TO_HOST
            self._num_copying += 1
            self._copies.to_host(entry, entry.digest)
            return
        extent = self._make_room(entry.image.data.numel())
        if extent is None:
            return
        entry.extent = extent
        entry.phase = _Phase.TO_DEVICE
        self._num_copying += 1
        self._copies.to_device(entry, entry.digest, entry.image, self._arena.view(extent))

    def _make_room(self, num_elements: int) -> Extent | None:
        needed = Arena.rounded(num_elements)
        while True:
            extent = self._arena.allocate(num_elements)
            if extent is not None:
                return extent
            if self._arena.num_free >= needed:
                if any(entry.phase is _Phase.TO_DEVICE for entry in self._entries.values()):
                    return None
                self._compact()
                continue
            victim = next((e for e in self._entries.values() if self._evictable(e)), None)
            if victim is None:
                return None
            self._evict(victim)

    @staticmethod
    def _evictable(entry: _Entry) -> bool:
        return entry.resident and entry.num_users == 0 and not entry.pinned and not entry.fresh

    def _evict(self, entry: _Entry) -> int:
        if entry.extent is None:
            return 0
        freed = entry.extent.size * self._dtype.itemsize
        self._arena.free(entry.extent)
        entry.extent = None
        if entry.slot >= 0:
            del self._deltas[entry.slot]
            if self.tables is not None:
                self.tables.forget(entry.slot)
            self._slots.give(entry.slot)
            entry.slot = -1
        self._forget_if_empty(entry)
        return freed

    def _compact(self) -> None:
        moved = {id(extent) for extent in self._arena.compact()}
        for entry in self._entries.values():
            if entry.extent is not None and id(entry.extent) in moved and entry.resident:
                self._place(entry)

    def _place(self, entry: _Entry) -> None:
        assert entry.extent is not None
        assert entry.layout is not None
        self._deltas[entry.slot] = entry.layout.deltas(self._arena.view(entry.extent))
        if self.tables is not None:
            self.tables.place(entry.slot, entry.extent.start, entry.layout)

    def _forget_if_empty(self, entry: _Entry) -> None:
        empty = entry.image is None and entry.extent is None and entry.phase is _Phase.STILL
        if empty and not entry.pinned and entry.digest not in self._wanted and entry.failure is None:
            self._entries.pop(entry.digest, None)

    def _take_in(self, landed: Landed[_Entry]) -> None:
        entry = landed.owner
        phase, entry.phase = entry.phase, _Phase.STILL
        self._num_copying -= 1
        if landed.failure is not None:
            if entry.extent is not None:
                self._arena.free(entry.extent)
                entry.extent = None
            self._fail(entry, landed.failure)
            return
        if phase is _Phase.TO_HOST:
            assert landed.image is not None
            self._keep_on_host(entry, landed.image)
        else:
            entry.slot = self._slots.take()
            self._wanted.discard(entry.digest)
            entry.fresh = True
            self._fresh.append(entry)
            self._place(entry)
            self._trim_host()

    def _fail(self, entry: _Entry, failure: Failure) -> None:
        self._wanted.discard(entry.digest)
        entry.failure = failure

    def _keep_on_host(self, entry: _Entry, image: AdapterImage) -> None:
        if Arena.rounded(image.data.numel()) > self._arena.num_elements:
            message = (
                f"the adapter takes {image.num_bytes / 2**20:.1f} MiB, more than all memory set aside for adapters "
                f"({self.bytes_total / 2**20:.1f} MiB); raise --adapter-memory"
            )
            self._fail(entry, Failure("adapter_load_failed", message))
            return
        entry.image = image
        self._host_bytes += image.num_bytes
        entry.layout = image.layout
        self._trim_host()

    def _trim_host(self) -> None:
        if self._host_bytes <= self._limits.host_bytes:
            return
        for entry in list(self._entries.values()):
            if entry.phase is _Phase.STILL and entry.digest not in self._wanted:
                self._drop_image(entry)
                self._forget_if_empty(entry)
            if self._host_bytes <= self._limits.host_bytes:
                return

    def _drop_image(self, entry: _Entry) -> int:
        if entry.image is None:
            return 0
        freed = entry.image.num_bytes
        self._host_bytes -= freed
        entry.image = None
        return freed
