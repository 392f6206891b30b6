"""Adapter images in host memory: the recently used, within a limit."""

from collections import OrderedDict
from collections.abc import Callable

from loraplex_server.engine.adapter_image import AdapterImage
from loraplex_server.engine.host_memory import HostBlock, HostMemory


class HostTier:
    """Images by digest, least recently used first. Owned by the engine's thread.

    ``may_drop`` says whether an image may go when another needs its room; ``on_drop`` hears of those that went.
    """

    def __init__(self, memory: HostMemory, *, may_drop: Callable[[str], bool], on_drop: Callable[[str], None]) -> None:
        self._memory = memory
        self._may_drop = may_drop
        self._on_drop = on_drop
        self._images: OrderedDict[str, tuple[AdapterImage, HostBlock]] = OrderedDict()
        self._num_being_made = 0
        self.num_bytes = 0

    def __contains__(self, digest: object) -> bool:
        return digest in self._images

    def get(self, digest: str) -> AdapterImage | None:
        found = self._images.get(digest)
        return found[0] if found else None

    def touch(self, digest: str) -> None:
        """The adapter is being used."""
        if digest in self._images:
            self._images.move_to_end(digest)

    def reserve(self, num_elements: int) -> HostBlock | None:
        """Room for an image, if need be in the place of others; None while there is none. Kept or given back later."""
        block = self._memory.take(num_elements)
        if block is None:
            for digest in [digest for digest in self._images if self._may_drop(digest)]:
                self.drop(digest)
                self._on_drop(digest)
                block = self._memory.take(num_elements)
                if block is not None:
                    break
        if block is None and not self._images and not self._num_being_made:
            # However small the limit, one adapter must pass.
            block = self._memory.take(num_elements, beyond_limit=True)
        self._num_being_made += block is not None
        return block

    def keep(self, digest: str, image: AdapterImage, block: HostBlock) -> None:
        """The image that was made in a reserved block."""
        self._num_being_made -= 1
        self._images[digest] = (image, block)
        self.num_bytes += image.num_bytes

    def give_back(self, block: HostBlock) -> None:
        """A reserved block was not used."""
        self._num_being_made -= 1
        self._memory.give(block)

    def drop(self, digest: str) -> int:
        """Forget an image; the bytes given back, 0 if there is none."""
        found = self._images.pop(digest, None)
        if found is None:
            return 0
        image, block = found
        self._memory.give(block)
        self.num_bytes -= image.num_bytes
        return image.num_bytes
