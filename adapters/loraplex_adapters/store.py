"""Content-addressed adapter directories on disk: all or nothing, whatever kills the process.

``root/adapters/<digest>/`` holds complete adapters only; ``root/incoming/`` holds what is being received and is emptied
at start. A directory enters ``adapters`` by one rename, after its files and itself have been synced.
"""

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_adapters.base import BaseShape
from loraplex_adapters.errors import AdapterNotFound, InvalidAdapter, StoreFull, WrongBase
from loraplex_adapters.format import (
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    AdapterWeights,
    read,
    read_layout,
    read_trusted,
    write,
)
from loraplex_adapters.lora_config import CONFIG_NAME
from loraplex_adapters.manifest import MANIFEST_NAME, Manifest, check_uploaded_manifest, digest_of, make_manifest
from loraplex_adapters.stored import StoredAdapter, StoredLayouts

README_NAME = "README.md"
KEPT_NAMES = (CONFIG_NAME, WEIGHTS_NAME, README_NAME, MANIFEST_NAME)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SPARE_BYTES = 64 << 20


class AdapterStore:
    """Adapters by digest below ``root``. Safe for several threads; one process owns a root."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._adapters = self.root / "adapters"
        self._incoming = self.root / "incoming"
        for directory in (self.root, self._adapters, self._incoming):
            directory.mkdir(parents=True, exist_ok=True)
        _sync(self.root)
        self._manifests: dict[str, Manifest] = {}  # they never change: the digest names the content
        self._layouts = StoredLayouts()

    @contextmanager
    def stage(self, num_bytes: int = 0) -> Iterator[Path]:
        """A fresh directory on the store's file system, gone after the block unless it was committed.

        Raises: StoreFull if fewer than ``num_bytes`` and a reserve are free, or the disk fills up inside the block.
        """
        self.check_room(num_bytes)
        staged = self._incoming / uuid.uuid4().hex
        staged.mkdir(mode=0o700)
        try:
            yield staged
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(f"The disk of {self.root} filled up; nothing was kept. Delete adapters.") from error
            raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def check_room(self, num_bytes: int) -> None:
        """Raise StoreFull unless ``num_bytes`` fit on the disk with a reserve of 64 MiB."""
        free = shutil.disk_usage(self.root).free
        if free < num_bytes + _SPARE_BYTES:
            raise StoreFull(
                f"The disk of {self.root} has {free} bytes free; {num_bytes} and a reserve of {_SPARE_BYTES} are needed. "
                "Delete adapters that are no longer used."
            )

    def commit(self, staged: Path, base: BaseShape, source: str | None = None) -> Manifest:
        """Check the staged directory and make it a stored adapter; the same content again is the same adapter.

        Raises: InvalidAdapter and its kin with the reason; nothing is kept then.
        """
        manifest = self.prepare(staged, base, source)
        self.adopt(staged, manifest)
        return self.manifest(manifest.digest)

    def prepare(self, staged: Path, base: BaseShape, source: str | None = None) -> Manifest:
        """The slow half of ``commit``: check everything, strip other files, write the manifest, sync it all."""
        _refuse_pickles(staged)
        for path in staged.iterdir():
            if path.name not in KEPT_NAMES or path.is_symlink() or not path.is_file():
                _remove(path)
        layout = read_layout(staged)
        check_uploaded_manifest(staged, base)
        weights = read(staged, base)
        if layout.is_fused:
            # What is stored names the base's own modules, so that it can be read without another look at the base.
            write(staged, weights, base_model_name=layout.config.base_model_name)
            layout = read_layout(staged)
        manifest = make_manifest(layout, digest_of(staged, layout), base, source)
        (staged / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        for path in staged.iterdir():
            path.chmod(0o644)
            _sync(path)
        _sync(staged)
        return manifest

    def adopt(self, staged: Path, manifest: Manifest) -> bool:
        """The atomic half of ``commit``. False if the content was stored already.

        Raises: WrongBase if it is stored for another base.
        """
        target = self._path(manifest.digest)
        if not target.exists():
            staged.chmod(0o755)
            try:
                os.rename(staged, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                _sync(self._adapters)
                return True
        stored = self.manifest(manifest.digest)
        if stored.base_fingerprint != manifest.base_fingerprint:
            raise WrongBase(
                f"This adapter is stored already, for base {stored.base_fingerprint[:16]}; this server's base is "
                f"{manifest.base_fingerprint[:16]}. Use one data directory a base."
            )
        return False

    def open(self, digest: str) -> AdapterWeights:
        """The adapter's factors, memory-mapped. Its content was checked when it came in and is trusted here."""
        path = self.path(digest)
        try:
            return read_trusted(path)
        except (OSError, InvalidAdapter):
            self.path(digest)  # deleted meanwhile: say that instead
            raise

    def locate(self, digest: str) -> StoredAdapter:
        """Where the adapter's factors lie, for readers of their own. Raises AdapterNotFound, InvalidAdapter."""
        path = self.path(digest)
        try:
            return self._layouts.locate(path)
        except OSError:
            self.path(digest)  # as in open
            raise

    def manifest(self, digest: str) -> Manifest:
        """What is known of a stored adapter. Raises AdapterNotFound."""
        manifest = self._manifests.get(digest)
        if manifest is None:
            try:
                text = (self.path(digest) / MANIFEST_NAME).read_text(encoding="utf-8")
            except FileNotFoundError:
                raise _not_stored(digest) from None
            manifest = self._manifests[digest] = Manifest.from_json(text)
        return manifest

    def path(self, digest: str) -> Path:
        """The stored directory. Raises AdapterNotFound."""
        path = self._path(digest)
        if not path.is_dir():
            raise _not_stored(digest)
        return path

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise AdapterNotFound(f"{digest[:64]!r} is not a digest of 64 hex characters.", code="digest_not_found")
        return self._adapters / digest

    def delete(self, digest: str) -> None:
        """Remove a stored adapter; maps of its weights that are open stay readable. Raises AdapterNotFound."""
        doomed = self._incoming / f"deleted-{uuid.uuid4().hex}"
        try:
            os.rename(self.path(digest), doomed)
        except FileNotFoundError:
            return  # another thread was faster
        self._manifests.pop(digest, None)
        _sync(self._adapters)
        shutil.rmtree(doomed, ignore_errors=True)

    def digests(self) -> set[str]:
        """All stored digests."""
        return {path.name for path in self._adapters.iterdir() if _DIGEST.fullmatch(path.name)}

    def sweep(self, keep: Collection[str]) -> set[str]:
        """Remove what a crash left behind and every adapter not in ``keep``; the digests removed. Only for the start."""
        for path in self._incoming.iterdir():
            _remove(path)
        removed = self.digests() - set(keep)
        for digest in removed:
            self.delete(digest)
        return removed


def _not_stored(digest: str) -> AdapterNotFound:
    return AdapterNotFound(f"No adapter with digest {digest[:64]!r} is stored.", code="digest_not_found")


def _refuse_pickles(staged: Path) -> None:
    for path in sorted(staged.rglob("*")):
        if path.name.lower().endswith(PICKLE_SUFFIXES):
            raise InvalidAdapter(
                f"{path.name[:80]!r} may be a pickle, and pickles can run code: they are refused. Send only {CONFIG_NAME} "
                f"and {WEIGHTS_NAME}.",
                code="pickle_refused",
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
