"""Where each adapter is: on disk, in (pinned) host memory, on the device; and how it gets there.

An adapter is found (how large will it be?), made in host memory, and copied to the device; each step waits for room and
for its turn, in the order in which adapters were asked for. The work is done beside the step loop (``engine.copies``), so
a load never blocks it and a request waits only for its own adapter. All state here belongs to the engine's thread;
``poll`` takes in what has been done once a step, and costs nothing that grows with the number of adapters.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.adapter_image import AdapterLayout
from loraplex_server.engine.copies import NUM_READS, Copies, Landed
from loraplex_server.engine.device_tier import DeviceTier, SlotTables
from loraplex_server.engine.epilogue import BaseWeights
from loraplex_server.engine.extents import Extents
from loraplex_server.engine.host_memory import HostBlock, HostMemory
from loraplex_server.engine.host_tier import HostTier
from loraplex_server.engine.image_source import ImageSource, OpenAdapter
from loraplex_server.engine.messages import AdapterLoad, Failure, Residency
from loraplex_server.kernels.lora_ref import GroupDelta
from loraplex_server.model.adapters import OutsideParts

# Copies to the device that are under way or next in line; the bus takes one at a time.
_NUM_SENDS: Final = 2
_NUM_FINDS: Final = 8


class AdapterLoadError(Exception):
    """An adapter cannot be brought to the device; ``failure`` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class _Phase(Enum):
    STILL = "still"
    FINDING = "finding"
    TO_HOST = "to_host"
    TO_DEVICE = "to_device"


@dataclass(slots=True, eq=False)
class _Entry:
    """What is known of an adapter that is in memory, on its way, or asked for."""

    digest: str
    phase: _Phase = _Phase.STILL
    source: ImageSource | None = None
    layout: AdapterLayout | None = None
    block: HostBlock | None = None
    num_users: int = 0
    num_expected: int = 0
    pinned: bool = False
    wanted: bool = False
    urgent: bool = False
    # It came in since requests were last admitted: evicted now, it would have been loaded for nobody.
    fresh: bool = False
    failure: Failure | None = None


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
        weights: BaseWeights | None = None,
    ) -> None:
        self._itemsize = dtype.itemsize
        self._entries: dict[str, _Entry] = {}
        self._memory = HostMemory(limits.host_bytes, dtype, pinned=device.type == "cuda")
        self._host = HostTier(self._memory, may_drop=self._may_drop_image, on_drop=self._changed_tier)
        self._device = DeviceTier(limits.device_bytes, dtype, device)
        self._copies: Copies[_Entry] = Copies(
            open_adapter=open_adapter, base=base, dtype=dtype, device=device, wake=wake, weights=weights
        )
        # Who waits for its turn, by what must be done next. An entry whose turn has passed otherwise is skipped.
        self._to_find: deque[_Entry] = deque()
        self._to_read: deque[_Entry] = deque()
        self._to_send: deque[_Entry] = deque()
        self._num_under_way = dict.fromkeys(_Phase, 0)
        self._num_urgent = 0
        # Who found no room on the device, and when: asking again is of no use before something there has changed.
        self._no_room: tuple[_Entry, int, int] | None = None
        self._fresh: list[_Entry] = []
        self._changed: set[str] = set()
        self._lock_ahead()

    # --- the model's side -------------------------------------------------------------------------------------------

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        return self._device.delta(slot, layer, group)

    def outside(self, slot: int) -> OutsideParts | None:
        return self._device.outside(slot)

    @property
    def arena(self) -> Tensor:
        """The device memory that all resident adapters lie in."""
        return self._device.arena.data

    @property
    def tables(self) -> SlotTables | None:
        """What is told of adapters' places, where kernels need it."""
        return self._device.tables

    @tables.setter
    def tables(self, tables: SlotTables) -> None:
        self._device.tables = tables

    # --- the scheduler's side ---------------------------------------------------------------------------------------

    def prefetch(self, digest: str) -> None:
        """Start bringing an adapter to the device if it is not there or on its way."""
        entry = self._entry(digest)
        self._refile(entry)
        self._want(entry)

    def expect(self, digest: str) -> None:
        """One more request waits that will use the adapter. It is brought in when its turn comes."""
        self._entry(digest).num_expected += 1
        self.prefetch(digest)

    def dismiss(self, digest: str) -> None:
        """One request fewer waits for the adapter."""
        entry = self._entries.get(digest)
        if entry is not None and entry.num_expected > 0:
            entry.num_expected -= 1
            self._refile(entry)
            if entry.num_expected == 0:
                self._calm(entry)
                self._forget_if_empty(entry)

    def acquire(self, digest: str, *, urgent: bool = False) -> int | None:
        """Hold an adapter for one sequence: its slot, or None while it is on its way or has no room.

        ``urgent``: it goes first, and adapters that others wait for may make room for it.
        Raises: AdapterLoadError if it could not be loaded; the next call tries again.
        """
        entry = self._entry(digest)
        if entry.failure is not None:
            failure, entry.failure = entry.failure, None
            self._forget_if_empty(entry)
            raise AdapterLoadError(failure)
        slot = self._device.slot(digest)
        if slot < 0:
            self._want(entry, urgent=urgent)
            return None
        entry.num_users += 1
        entry.fresh = False
        self._refile(entry)
        self._host.touch(digest)
        return slot

    def release(self, digest: str) -> None:
        """One sequence fewer uses the adapter."""
        entry = self._entries[digest]
        assert entry.num_users > 0
        entry.num_users -= 1
        self._refile(entry)

    def lacks_room(self, digest: str) -> bool:
        """Whether the adapter could be copied to the device at once if others left it."""
        entry = self._entries.get(digest)
        waits = entry is not None and entry.wanted and entry.phase is _Phase.STILL
        return waits and bool(self._to_send) and self._num_under_way[_Phase.TO_DEVICE] == 0

    def pin(self, digest: str, pinned: bool) -> None:
        """A pinned adapter stays on the device once it is there."""
        entry = self._entry(digest)
        entry.pinned = pinned
        self._refile(entry)
        self._forget_if_empty(entry)

    def drop(self, digest: str) -> int | None:
        """Free every tier of an adapter: the bytes given back, or None while it is in use or being copied."""
        entry = self._entries.get(digest)
        if entry is None:
            return 0
        if entry.num_users > 0 or entry.phase is not _Phase.STILL:
            return None
        self._no_longer_wanted(entry)
        freed = self._host.drop(digest) + self._device.evict(digest)
        del self._entries[digest]
        self._changed.add(digest)
        return freed

    def poll(self) -> list[AdapterLoad]:
        """Take in what the copying threads have finished, and start what can follow."""
        loads = []
        for landed in self._copies.landed():
            if landed.load is not None:
                loads.append(landed.load)
            self._take_in(landed)
        self._go_on()
        return loads

    def expose(self) -> None:
        """All who waited for what has landed have been served: it may be evicted like any other again.

        Without this pause two adapters that need the same room would push each other out for ever.
        """
        fresh, self._fresh = self._fresh, []
        for entry in fresh:
            entry.fresh = False
            if self._entries.get(entry.digest) is entry:
                self._refile(entry)

    # --- what is where ----------------------------------------------------------------------------------------------

    @property
    def bytes_used(self) -> int:
        return self._device.bytes_used

    @property
    def bytes_total(self) -> int:
        return self._device.bytes_total

    @property
    def host_bytes_used(self) -> int:
        return self._host.num_bytes

    @property
    def num_copies_running(self) -> int:
        return sum(self._num_under_way.values())

    def take_changed(self) -> set[str]:
        """The adapters whose ``where`` may have another answer since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def where(self, digest: str) -> tuple[Residency, int, bool]:
        """Tier, bytes and whether it is pinned."""
        entry = self._entries.get(digest)
        if entry is None:
            return "disk", 0, False
        tier: Residency = "gpu" if self._device.slot(digest) >= 0 else "host" if digest in self._host else "disk"
        num_bytes = entry.layout.num_elements * self._itemsize if entry.layout else 0
        return tier, num_bytes, entry.pinned

    def is_known(self, digest: str) -> bool:
        """Whether the adapter is in memory, on its way, or pinned."""
        return digest in self._entries

    def is_resident(self, digest: str) -> bool:
        return self._device.slot(digest) >= 0

    def is_settled(self, digest: str) -> bool:
        """Whether ``acquire`` would say something new: it is resident, or its load failed."""
        entry = self._entries.get(digest)
        return entry is not None and (entry.failure is not None or self._device.slot(digest) >= 0)

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

    # --- state ------------------------------------------------------------------------------------------------------

    def _entry(self, digest: str) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = _Entry(digest)
        return entry

    def _refile(self, entry: _Entry) -> None:
        """Say anew whether a resident adapter may be evicted; it counts as used just now."""
        self._changed.add(entry.digest)
        if self._device.slot(entry.digest) < 0:
            return
        if entry.num_users or entry.pinned or entry.fresh:
            self._device.hold(entry.digest)
        else:
            self._device.let_go(entry.digest, awaited=entry.num_expected > 0)

    def _may_drop_image(self, digest: str) -> bool:
        entry = self._entries[digest]
        return not entry.wanted and entry.phase is _Phase.STILL

    def _changed_tier(self, digest: str) -> None:
        """The adapter has left host memory or the device."""
        self._changed.add(digest)
        entry = self._entries.get(digest)
        if entry is not None:
            self._forget_if_empty(entry)

    def _forget_if_empty(self, entry: _Entry) -> None:
        needed = entry.wanted or entry.pinned or entry.num_expected or entry.failure is not None
        if needed or entry.phase is not _Phase.STILL or entry.digest in self._host or self.is_resident(entry.digest):
            return
        self._entries.pop(entry.digest, None)
        self._changed.add(entry.digest)

    # --- taking turns -----------------------------------------------------------------------------------------------

    def _want(self, entry: _Entry, *, urgent: bool = False) -> None:
        if self.is_resident(entry.digest) or entry.failure is not None:
            return
        if urgent and not entry.urgent:
            entry.urgent = True
            self._num_urgent += 1
        elif entry.wanted:
            return
        entry.wanted = True
        self._queue(entry)
        self._go_on()

    def _queue(self, entry: _Entry) -> None:
        if entry.phase is not _Phase.STILL:
            return  # it is queued again when that has ended
        turns = self._to_send if entry.digest in self._host else self._to_read if entry.source else self._to_find
        if entry.urgent:
            turns.appendleft(entry)
        else:
            turns.append(entry)

    def _calm(self, entry: _Entry) -> None:
        if entry.urgent:
            entry.urgent = False
            self._num_urgent -= 1

    def _no_longer_wanted(self, entry: _Entry) -> None:
        entry.wanted = False
        self._calm(entry)

    def _go_on(self) -> None:
        """Start what has its turn and its room."""
        self._start_all(self._to_send, _Phase.TO_DEVICE, _NUM_SENDS, self._send)
        self._start_all(self._to_read, _Phase.TO_HOST, NUM_READS, self._read)
        self._start_all(self._to_find, _Phase.FINDING, _NUM_FINDS, self._find)

    def _start_all(self, turns: deque[_Entry], phase: _Phase, most: int, start: Callable[[_Entry], bool]) -> None:
        while turns and self._num_under_way[phase] < most:
            entry = turns[0]
            if entry.wanted and entry.phase is _Phase.STILL and self._next_phase(entry) is phase:
                if not start(entry):
                    return  # whoever is behind it waits too, or the large would never get their room
                entry.phase = phase
                self._num_under_way[phase] += 1
            turns.popleft()

    def _next_phase(self, entry: _Entry) -> _Phase:
        if entry.digest in self._host:
            return _Phase.TO_DEVICE
        return _Phase.TO_HOST if entry.source else _Phase.FINDING

    def _find(self, entry: _Entry) -> bool:
        self._copies.find(entry, entry.digest)
        return True

    def _read(self, entry: _Entry) -> bool:
        assert entry.source is not None
        block = self._host.reserve(entry.source.layout.num_elements)
        if block is None:
            return False
        entry.block = block
        self._copies.to_host(entry, entry.digest, entry.source, block)
        self._lock_ahead()
        return True

    def _send(self, entry: _Entry) -> bool:
        asked = (entry, self._num_urgent, self._device.num_changes)
        if asked == self._no_room:
            return False
        image = self._host.get(entry.digest)
        assert image is not None
        extent = self._device.reserve(entry.digest, image.layout, urgent=self._num_urgent > 0)
        for digest in self._device.take_evicted():
            self._changed_tier(digest)
        if extent is None:
            self._no_room = asked
            return False
        target = self._device.arena.view(extent)
        self._copies.to_device(entry, entry.digest, image, target, self._device.free_since)
        return True

    def _lock_ahead(self) -> None:
        """Have the next piece of host memory made before it is needed."""
        for segment in self._memory.spares():
            self._copies.make_memory(segment)

    # --- what has ended ---------------------------------------------------------------------------------------------

    def _take_in(self, landed: Landed[_Entry]) -> None:
        entry = landed.owner
        phase, entry.phase = entry.phase, _Phase.STILL
        self._num_under_way[phase] -= 1
        self._changed.add(entry.digest)
        if landed.failure is not None:
            self._take_back(entry, phase)
            self._fail(entry, landed.failure)
        elif landed.source is not None:
            self._found(entry, landed.source)
        elif landed.image is not None:
            assert entry.block is not None
            self._host.keep(entry.digest, landed.image, entry.block)
            entry.block = None
            self._queue(entry)
        else:
            self._arrived(entry)

    def _take_back(self, entry: _Entry, phase: _Phase) -> None:
        if phase is _Phase.TO_HOST:
            assert entry.block is not None
            self._host.give_back(entry.block)
            entry.block = None
        elif phase is _Phase.TO_DEVICE:
            self._device.evict(entry.digest)

    def _fail(self, entry: _Entry, failure: Failure) -> None:
        self._no_longer_wanted(entry)
        entry.source = None  # it may be another the next time
        entry.failure = failure

    def _found(self, entry: _Entry, source: ImageSource) -> None:
        entry.source, entry.layout = source, source.layout
        num_elements = source.layout.num_elements
        if Extents.rounded(num_elements) > self._device.arena.num_elements:
            message = (
                f"the adapter takes {num_elements * self._itemsize / 2**20:.1f} MiB, more than all memory set aside for "
                f"adapters ({self.bytes_total / 2**20:.1f} MiB); raise --adapter-memory"
            )
            self._fail(entry, Failure("adapter_load_failed", message))
        else:
            self._queue(entry)

    def _arrived(self, entry: _Entry) -> None:
        self._device.settle(entry.digest)
        self._no_longer_wanted(entry)
        entry.fresh = True
        self._fresh.append(entry)
        self._host.touch(entry.digest)
