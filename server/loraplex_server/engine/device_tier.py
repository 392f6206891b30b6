"""Adapters on the device: where each lies, which slot stands for it, and who makes room for whom."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import torch

from loraplex_server.engine.adapter_image import AdapterLayout
from loraplex_server.engine.arena import Arena
from loraplex_server.engine.extents import Extent
from loraplex_server.engine.slots import Slots
from loraplex_server.kernels.lora_ref import GroupDelta
from loraplex_server.model.adapters import OutsideParts


class SlotTables(Protocol):
    """What is told of every resident adapter's place: its slot, its first element in the arena, its layout."""

    def place(self, slot: int, start: int, layout: AdapterLayout) -> None: ...
    def forget(self, slot: int) -> None: ...


@dataclass(slots=True, eq=False)
class Resident:
    """An adapter that is on the device, or on its way there while ``slot`` is -1."""

    digest: str
    layout: AdapterLayout
    extent: Extent
    slot: int = -1
    deltas: dict[tuple[int, str], GroupDelta | None] = field(default_factory=dict)
    outside: OutsideParts | None = None


class DeviceTier:
    """One arena of adapters. Owned by the engine's thread.

    An adapter that may go is either ``idle`` or ``awaited``: not used now, but requests wait that will use it. The
    awaited make room only for what has waited too long.
    """

    def __init__(self, num_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self._arena = Arena(max(num_bytes // dtype.itemsize, 1), dtype, device)
        self._itemsize = dtype.itemsize
        self._slots = Slots()
        self._residents: dict[str, Resident] = {}
        self._by_slot: dict[int, Resident] = {}
        self._idle: OrderedDict[str, Resident] = OrderedDict()  # least recently used first, as the next
        self._awaited: OrderedDict[str, Resident] = OrderedDict()
        self._evicted: list[str] = []
        self.num_changes = 0
        """Counts whatever may give room to one that found none."""
        self._on_gpu = device.type == "cuda"
        # Where kernels find the factors; set where there are such kernels.
        self.tables: SlotTables | None = None
        self.free_since: torch.cuda.Event | None = None
        """After this, no step reads what is free now."""

    # --- what is where ----------------------------------------------------------------------------------------------

    @property
    def arena(self) -> Arena:
        return self._arena

    @property
    def bytes_used(self) -> int:
        return self._arena.num_used * self._itemsize

    @property
    def bytes_total(self) -> int:
        return self._arena.num_elements * self._itemsize

    def slot(self, digest: str) -> int:
        """The adapter's slot, -1 if it is not there (yet)."""
        resident = self._residents.get(digest)
        return -1 if resident is None else resident.slot

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        """One group's factors; made when they are first asked for, since most kernels read ``tables`` instead."""
        resident = self._by_slot[slot]
        key = (layer, group)
        if key not in resident.deltas:
            resident.deltas[key] = resident.layout.delta(self._arena.view(resident.extent), key)
        return resident.deltas[key]

    def outside(self, slot: int) -> OutsideParts | None:
        """What the adapter changes outside the layers' linears."""
        resident = self._by_slot[slot]
        if resident.outside is None and resident.layout.outside is not None:
            resident.outside = resident.layout.outside_parts(self._arena.view(resident.extent))
        return resident.outside

    # --- coming and going -------------------------------------------------------------------------------------------

    def reserve(self, digest: str, layout: AdapterLayout, *, urgent: bool) -> Extent | None:
        """Room to copy an adapter to, in the place of others if need be; None, and nothing has changed, if there is none.

        ``urgent``: adapters that requests wait for may go too.
        """
        extent = self._arena.allocate(layout.num_elements) or self._make_room(layout.num_elements, urgent=urgent)
        if extent is not None:
            extent.held = True  # nothing moves what is being written to
            self._residents[digest] = Resident(digest, layout, extent)
        return extent

    def settle(self, digest: str) -> None:
        """The copy has ended: the adapter gets its slot."""
        resident = self._residents[digest]
        resident.extent.held = False
        self.num_changes += 1
        resident.slot = self._slots.take()
        self._by_slot[resident.slot] = resident
        self._tell(resident)

    def evict(self, digest: str) -> int:
        """Take an adapter off the device (or give up its copy); the bytes given back."""
        resident = self._residents.pop(digest, None)
        if resident is None:
            return 0
        self.hold(digest)
        self.num_changes += 1
        self._arena.free(resident.extent)
        self._mark_free()
        if resident.slot >= 0:
            del self._by_slot[resident.slot]
            if self.tables is not None:
                self.tables.forget(resident.slot)
            self._slots.give(resident.slot)
        return resident.extent.size * self._itemsize

    def take_evicted(self) -> list[str]:
        """Who has made room since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def hold(self, digest: str) -> None:
        """The adapter must stay."""
        self._idle.pop(digest, None)
        self._awaited.pop(digest, None)

    def let_go(self, digest: str, *, awaited: bool) -> None:
        """Nobody uses the adapter now; it counts as used just before."""
        self.hold(digest)
        self.num_changes += 1
        (self._awaited if awaited else self._idle)[digest] = self._residents[digest]

    # --- making room ------------------------------------------------------------------------------------------------

    def _make_room(self, num_elements: int, *, urgent: bool) -> Extent | None:
        victims = self._victims(Arena.rounded(num_elements), urgent=urgent)
        if victims is None:
            return None
        opening = self._arena.find(num_elements, without=[victim.extent for victim in victims])
        if opening is None:
            return None
        for victim in victims:
            self.evict(victim.digest)
            self._evicted.append(victim.digest)
        moved = set(map(id, self._arena.make(opening)))
        if moved:
            self._mark_free()
            for resident in self._by_slot.values():
                if id(resident.extent) in moved:
                    self._tell(resident)
        return self._arena.allocate(num_elements)

    def _victims(self, size: int, *, urgent: bool) -> list[Resident] | None:
        """The least recently used that together make room for ``size`` elements, and none of them in vain."""
        missing = size - self._arena.num_free
        victims: list[Resident] = []
        candidates: Iterator[Resident] = iter(self._idle.values())
        if urgent:
            candidates = chain(candidates, self._awaited.values())
        while missing > 0:
            victim = next(candidates, None)
            if victim is None:
                return None
            victims.append(victim)
            missing -= victim.extent.size
        needed = []
        for victim in reversed(victims):
            if missing + victim.extent.size > 0:
                needed.append(victim)
            else:
                missing += victim.extent.size
        return needed

    def _tell(self, resident: Resident) -> None:
        resident.deltas.clear()
        resident.outside = None
        if self.tables is not None:
            self.tables.place(resident.slot, resident.extent.start, resident.layout)

    def _mark_free(self) -> None:
        if self._on_gpu:
            self.free_since = torch.cuda.current_stream(self._arena.data.device).record_event()
