"""A stored adapter that is about to be read: where each factor lies in its file, found without touching a tensor.

Adapters trained alike have the same config and the same header to the byte, so what the two say is worked out once for
all of them.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapters.errors import InvalidAdapter
from loraplex_adapters.format import WEIGHTS_NAME, AdapterLayout, AdapterWeights, read_layout, read_trusted
from loraplex_adapters.lora_config import CONFIG_NAME

_LAYOUTS_KEPT = 64


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """One adapter's directory and what its config and header say. ``layout`` is shared by adapters that are alike."""

    directory: Path
    layout: AdapterLayout

    @property
    def weights_path(self) -> Path:
        return self.directory / WEIGHTS_NAME

    def weights(self) -> AdapterWeights:
        """The factors, memory-mapped. Raises InvalidAdapter."""
        return read_trusted(self.directory, self.layout)


class StoredLayouts:
    """The layouts of directories whose content was checked before and never changes. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, bytes, int], AdapterLayout] = OrderedDict()

    def locate(self, directory: Path) -> StoredAdapter:
        """Raises InvalidAdapter, OSError."""
        key = _fingerprint(directory)
        with self._lock:
            layout = self._kept.get(key)
            if layout is not None:
                self._kept.move_to_end(key)
                return StoredAdapter(directory, layout)
        layout = read_layout(directory)
        with self._lock:
            layout = self._kept.setdefault(key, layout)
            while len(self._kept) > _LAYOUTS_KEPT:
                self._kept.popitem(last=False)
        return StoredAdapter(directory, layout)


def _fingerprint(directory: Path) -> tuple[bytes, bytes, int]:
    """All that a layout is made of: the config, the header, and the file's size."""
    config = (directory / CONFIG_NAME).read_bytes()
    with (directory / WEIGHTS_NAME).open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        size = file.seek(0, 2)
        if len(prefix) < 8 or length > size:
            raise InvalidAdapter(f"{WEIGHTS_NAME} has become shorter since it came in.", code="weights_broken")
        file.seek(8)
        return config, file.read(length), size
