"""Where each adapter is: on disk, in (pinned) host memory, on the device; who uses it, and who waits for it.

Loading is done beside the step loop (``engine.loading``), so it never blocks a step and a request waits only for its own
adapter. All state here belongs to the engine's thread; ``poll`` takes in what has been done once a step, and costs
nothing that grows with the number of adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.copies import Copies
from loraplex_server.engine.device_tier import DeviceTier, SlotTables
from loraplex_server.engine.epilogue import BaseWeights
from loraplex_server.engine.host_memory import HostMemory
from loraplex_server.engine.host_tier import HostTier
from loraplex_server.engine.image_source import OpenAdapter
from loraplex_server.engine.loading import Loading, Phase, Traveler
from loraplex_server.engine.messages import AdapterLoad, Failure, Residency
from loraplex_server.kernels.lora_ref import GroupDelta
from loraplex_server.model.adapters import OutsideParts


class AdapterLoadError(Exception):
    """An adapter cannot be brought to the device; ``failure`` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(slots=True, eq=False)
class _Entry(Traveler):
    """What is known of an adapter that is in memory, on its way, or asked for."""

    num_users: int = 0
    num_expected: int = 0
    pinned: bool = False
    # It came in since requests were last admitted: evicted now, it would have been loaded for nobody.
    fresh: bool = False


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
        memory = HostMemory(limits.host_bytes, dtype, pinned=device.type == "cuda")
        self._host = HostTier(memory, may_drop=self._may_drop_image, on_drop=self._left_tier)
        self._device = DeviceTier(limits.device_bytes, dtype, device)
        copies: Copies[Traveler] = Copies(
            open_adapter=open_adapter, base=base, dtype=dtype, device=device, wake=wake, weights=weights
        )
        self._loading = Loading(
            copies, memory, self._host, self._device, on_arrival=self._arrived, on_eviction=self._left_tier
        )
        self._fresh: list[_Entry] = []
        self._changed: set[str] = set()

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
                self._loading.calm(entry)
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
        return entry is not None and self._loading.lacks_room(entry)

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
        if entry.num_users > 0 or entry.phase is not Phase.STILL:
            return None
        self._loading.give_up(entry)
        freed = self._host.drop(digest) + self._device.evict(digest)
        del self._entries[digest]
        self._changed.add(digest)
        return freed

    def poll(self) -> list[AdapterLoad]:
        """Take in what the copying threads have finished, and start what can follow."""
        loads = []
        for landed in self._loading.poll():
            self._changed.add(landed.owner.digest)
            if landed.load is not None:
                loads.append(landed.load)
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
        return self._loading.num_under_way

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
        self._loading.close()

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
        return not entry.wanted and entry.phase is Phase.STILL

    def _left_tier(self, digest: str) -> None:
        """The adapter has left host memory or the device."""
        self._changed.add(digest)
        entry = self._entries.get(digest)
        if entry is not None:
            self._forget_if_empty(entry)

    def _forget_if_empty(self, entry: _Entry) -> None:
        needed = entry.wanted or entry.pinned or entry.num_expected or entry.failure is not None
        if needed or entry.phase is not Phase.STILL or entry.digest in self._host or self.is_resident(entry.digest):
            return
        self._entries.pop(entry.digest, None)
        self._changed.add(entry.digest)

    def _want(self, entry: _Entry, *, urgent: bool = False) -> None:
        if not self.is_resident(entry.digest) and entry.failure is None:
            self._loading.want(entry, urgent=urgent)

    def _arrived(self, traveler: Traveler) -> None:
        entry = self._entries[traveler.digest]
        entry.fresh = True
        self._fresh.append(entry)
