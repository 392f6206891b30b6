"""One front door for new adapters: fetch or unpack, check, store, name."""

import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import BinaryIO

from loraplex_adapters.archives import unpack_archive, write_files
from loraplex_adapters.base import BaseShape
from loraplex_adapters.errors import AdapterNotFound
from loraplex_adapters.manifest import Manifest
from loraplex_adapters.registry import Adapter, AdapterRegistry
from loraplex_adapters.sources import AdapterSources
from loraplex_adapters.store import AdapterStore

Installed = tuple[Adapter, Manifest, bool]
"""The adapter, its manifest, and whether the name now stands for content that it did not stand for before."""


class AdapterInstaller:
    """Puts adapters into the store and the registry, all or nothing. Blocking; safe from several threads at once.

    Every method raises the errors of ``loraplex_adapters.errors`` and then leaves nothing behind.
    """

    def __init__(
        self, store: AdapterStore, registry: AdapterRegistry, sources: AdapterSources, base: BaseShape
    ) -> None:
        self.store = store
        self.registry = registry
        self.sources = sources
        self.base = base
        self._publishing = threading.Lock()

    def install_path(self, name: str, path: Path, *, replace: bool = False, pinned: bool | None = None) -> Installed:
        """Install a local folder or archive that the operator named; no allowed root is needed."""
        return self._install(name, lambda into: self.sources.fetch_trusted(path, into), replace, pinned)

    def install_source(self, name: str, source: str, *, replace: bool = False, pinned: bool | None = None) -> Installed:
        """Install from a path below an allowed root or from ``hf://org/repo[@revision]``."""
        return self._install(name, lambda into: self.sources.fetch(source, into), replace, pinned)

    def install_archive(
        self, name: str, archive: Path | BinaryIO, *, replace: bool = False, pinned: bool | None = None
    ) -> Installed:
        """Install an uploaded .zip, .tar or .tar.gz; ``archive`` must be seekable."""

        def fill(into: Path) -> str:
            unpack_archive(archive, into, max_bytes=self.sources.max_bytes)
            return "upload"

        return self._install(name, fill, replace, pinned)

    def install_files(
        self,
        name: str,
        files: Iterable[tuple[str, BinaryIO]],
        *,
        replace: bool = False,
        pinned: bool | None = None,
    ) -> Installed:
        """Install an adapter uploaded as several named files."""

        def fill(into: Path) -> str:
            write_files(files, into, max_bytes=self.sources.max_bytes)
            return "upload"

        return self._install(name, fill, replace, pinned)

    def discard_unused(self, keep: Collection[str] = ()) -> set[str]:
        """Delete stored adapters that no name uses and that are not in ``keep`` (held by requests); their digests."""
        with self._publishing:
            unused = self.store.digests() - self.registry.digests_in_use() - set(keep)
            for digest in unused:
                self.store.delete(digest)
            return unused

    def _install(self, name: str, fill: Callable[[Path], str], replace: bool, pinned: bool | None) -> Installed:
        self.registry.check_name(name)
        with self.store.stage() as staged:
            source = fill(staged)
            manifest = self.store.prepare(staged, self.base, source)
            with self._publishing:  # so that nothing is discarded between its arrival and its naming
                arrived = self.store.adopt(staged, manifest)
                before = self._digest_of(name)
                try:
                    adapter = self.registry.publish(
                        name, manifest.digest, replace=replace, source=source, pinned=pinned
                    )
                except BaseException:
                    if arrived:
                        self.store.delete(manifest.digest)
                    raise
        return adapter, self.store.manifest(adapter.digest), before != adapter.digest

    def _digest_of(self, name: str) -> str | None:
        try:
            return self.registry.resolve(name).digest
        except AdapterNotFound:
            return None
