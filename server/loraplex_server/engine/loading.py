"""The road of adapters to the device: found (how large will it be?), made in host memory, copied; each in its turn.

Each part of the road has a line, in the order in which adapters were asked for, and a number that may be on it at once.
Who is first in a line and finds no room holds up those behind, or a large adapter would never get its room.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from loraplex_server.engine.adapter_image import AdapterLayout
from loraplex_server.engine.copies import NUM_READS, Copies, Landed
from loraplex_server.engine.device_tier import DeviceTier
from loraplex_server.engine.extents import Extents
from loraplex_server.engine.host_memory import HostBlock, HostMemory
from loraplex_server.engine.host_tier import HostTier
from loraplex_server.engine.image_source import ImageSource
from loraplex_server.engine.messages import Failure

# Copies to the device that are under way or next in line; the bus takes one at a time.
_NUM_SENDS: Final = 2
_NUM_FINDS: Final = 8


class Phase(Enum):
    """What is being done with an adapter now."""

    STILL = "still"
    FINDING = "finding"
    TO_HOST = "to_host"
    TO_DEVICE = "to_device"


@dataclass(slots=True, eq=False)
class Traveler:
    """An adapter that is asked for, or was. ``urgent`` ones go first, and make room where others would not."""

    digest: str
    phase: Phase = Phase.STILL
    wanted: bool = False
    urgent: bool = False
    source: ImageSource | None = None
    layout: AdapterLayout | None = None
    block: HostBlock | None = None
    failure: Failure | None = None


class Loading:
    """Brings travelers to the device. Owned by the engine's thread.

    ``on_arrival`` hears of each that has got there, ``on_eviction`` of those who had to leave the device for it.
    """

    def __init__(
        self,
        copies: Copies[Traveler],
        memory: HostMemory,
        host: HostTier,
        device: DeviceTier,
        *,
        on_arrival: Callable[[Traveler], None],
        on_eviction: Callable[[str], None],
    ) -> None:
        self._copies = copies
        self._memory = memory
        self._host = host
        self._device = device
        self._on_arrival = on_arrival
        self._on_eviction = on_eviction
        # Whoever has gone on, or is not wanted any more, is skipped when it comes to the front.
        self._to_find: deque[Traveler] = deque()
        self._to_read: deque[Traveler] = deque()
        self._to_send: deque[Traveler] = deque()
        self._num_under_way = dict.fromkeys(Phase, 0)
        self._num_urgent = 0
        # Who found no room on the device, and when: asking again is of no use before something there has changed.
        self._no_room: tuple[Traveler, int, int] | None = None
        self._lock_ahead()

    @property
    def num_under_way(self) -> int:
        return sum(self._num_under_way.values())

    def want(self, traveler: Traveler, *, urgent: bool = False) -> None:
        """Have it brought to the device. It is not there, and its last failure was told."""
        if urgent and not traveler.urgent:
            traveler.urgent = True
            self._num_urgent += 1
        elif traveler.wanted:
            return
        traveler.wanted = True
        self._line_up(traveler)
        self._go_on()

    def calm(self, traveler: Traveler) -> None:
        """It is urgent no longer."""
        if traveler.urgent:
            traveler.urgent = False
            self._num_urgent -= 1

    def give_up(self, traveler: Traveler) -> None:
        """It need not be brought any more; what is being done with it is finished."""
        traveler.wanted = False
        self.calm(traveler)

    def lacks_room(self, traveler: Traveler) -> bool:
        """Whether it could be copied to the device at once if others left it."""
        waits = traveler.wanted and traveler.phase is Phase.STILL
        return waits and bool(self._to_send) and self._num_under_way[Phase.TO_DEVICE] == 0

    def poll(self) -> Iterator[Landed[Traveler]]:
        """Take in what has been done, and start what can follow. Yields it all: go through to the end."""
        for landed in self._copies.landed():
            self._take_in(landed)
            yield landed
        self._go_on()

    def close(self) -> None:
        self._copies.close()

    # --- taking turns -----------------------------------------------------------------------------------------------

    def _line_up(self, traveler: Traveler) -> None:
        if traveler.phase is not Phase.STILL:
            return  # it goes on when that has ended
        lines = {Phase.FINDING: self._to_find, Phase.TO_HOST: self._to_read, Phase.TO_DEVICE: self._to_send}
        line = lines[self._next_phase(traveler)]
        if traveler.urgent:
            line.appendleft(traveler)
        else:
            line.append(traveler)

    def _next_phase(self, traveler: Traveler) -> Phase:
        if traveler.digest in self._host:
            return Phase.TO_DEVICE
        return Phase.TO_HOST if traveler.source else Phase.FINDING

    def _go_on(self) -> None:
        """Start what has its turn and its room."""
        self._start(self._to_send, Phase.TO_DEVICE, _NUM_SENDS, self._send)
        self._start(self._to_read, Phase.TO_HOST, NUM_READS, self._read)
        self._start(self._to_find, Phase.FINDING, _NUM_FINDS, self._find)

    def _start(self, line: deque[Traveler], phase: Phase, most: int, begin: Callable[[Traveler], bool]) -> None:
        while line and self._num_under_way[phase] < most:
            traveler = line[0]
            if traveler.wanted and traveler.phase is Phase.STILL and self._next_phase(traveler) is phase:
                if not begin(traveler):
                    return
                traveler.phase = phase
                self._num_under_way[phase] += 1
            line.popleft()

    def _find(self, traveler: Traveler) -> bool:
        self._copies.find(traveler, traveler.digest)
        return True

    def _read(self, traveler: Traveler) -> bool:
        assert traveler.source is not None
        block = self._host.reserve(traveler.source.layout.num_elements)
        if block is None:
            return False
        traveler.block = block
        self._copies.to_host(traveler, traveler.digest, traveler.source, block)
        self._lock_ahead()
        return True

    def _send(self, traveler: Traveler) -> bool:
        asked = (traveler, self._num_urgent, self._device.num_changes)
        if asked == self._no_room:
            return False
        image = self._host.get(traveler.digest)
        assert image is not None
        extent = self._device.reserve(traveler.digest, image.layout, urgent=self._num_urgent > 0)
        for digest in self._device.take_evicted():
            self._on_eviction(digest)
        if extent is None:
            self._no_room = asked
            return False
        target = self._device.arena.view(extent)
        self._copies.to_device(traveler, traveler.digest, image, target, self._device.free_since)
        return True

    def _lock_ahead(self) -> None:
        """Have the next pieces of host memory made before they are needed."""
        for segment in self._memory.spares():
            self._copies.make_memory(segment)

    # --- what has ended ---------------------------------------------------------------------------------------------

    def _take_in(self, landed: Landed[Traveler]) -> None:
        traveler = landed.owner
        phase, traveler.phase = traveler.phase, Phase.STILL
        self._num_under_way[phase] -= 1
        if landed.failure is not None:
            self._take_back(traveler, phase)
            self._fail(traveler, landed.failure)
        elif landed.source is not None:
            self._found(traveler, landed.source)
        elif landed.image is not None:
            assert traveler.block is not None
            self._host.keep(traveler.digest, landed.image, traveler.block)
            traveler.block = None
            self._line_up(traveler)
        else:
            self._device.settle(traveler.digest)
            self._host.touch(traveler.digest)
            self.give_up(traveler)
            self._on_arrival(traveler)

    def _take_back(self, traveler: Traveler, phase: Phase) -> None:
        if phase is Phase.TO_HOST:
            assert traveler.block is not None
            self._host.give_back(traveler.block)
            traveler.block = None
        elif phase is Phase.TO_DEVICE:
            self._device.evict(traveler.digest)

    def _fail(self, traveler: Traveler, failure: Failure) -> None:
        self.give_up(traveler)
        traveler.source = None  # it may be another the next time
        traveler.failure = failure

    def _found(self, traveler: Traveler, source: ImageSource) -> None:
        traveler.source, traveler.layout = source, source.layout
        num_elements, itemsize = source.layout.num_elements, self._device.arena.data.element_size()
        if Extents.rounded(num_elements) > self._device.arena.num_elements:
            message = (
                f"the adapter takes {num_elements * itemsize / 2**20:.1f} MiB, more than all memory set aside for "
                f"adapters ({self._device.bytes_total / 2**20:.1f} MiB); raise --adapter-memory"
            )
            self._fail(traveler, Failure("adapter_load_failed", message))
        else:
            self._line_up(traveler)
