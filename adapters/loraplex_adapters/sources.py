"""Where adapters may come from: folders and archives below allowed roots, and the Hub. No other address is fetched."""

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from loraplex_adapters.archives import unpack_archive
from loraplex_adapters.errors import AdapterTooLarge, InvalidAdapter, SourceRefused
from loraplex_adapters.format import refuse_other_weights
from loraplex_adapters.hub import SCHEME, Hub
from loraplex_adapters.store import KEPT_NAMES

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_MAX_SOURCE_CHARS = 4096
_CHUNK_BYTES = 1 << 20


class AdapterSources:
    """Fetches adapters from local paths below ``allowed_roots`` and, with ``allow_hub``, from ``hf://`` sources.

    ``max_bytes`` bounds one adapter. ``hub_token`` is sent to the Hub at ``hub_endpoint`` only (None: the public one).
    """

    def __init__(
        self,
        allowed_roots: tuple[Path, ...] = (),
        hub_token: str | None = None,
        max_bytes: int = 8 << 30,
        allow_hub: bool = True,
        hub_endpoint: str | None = None,
    ) -> None:
        self.allowed_roots = tuple(root.resolve() for root in allowed_roots)
        self.max_bytes = max_bytes
        self._hub = Hub(hub_token, hub_endpoint) if allow_hub else None

    def fetch(self, source: str, into: Path) -> str:
        """Copy the adapter at ``source`` into the empty folder ``into``; the source, resolved.

        Raises: SourceRefused, SourceUnavailable, AdapterTooLarge, InvalidAdapter.
        """
        if not source or len(source) > _MAX_SOURCE_CHARS or "\0" in source:
            raise SourceRefused(f"A source is a path or hf://org/repo of at most {_MAX_SOURCE_CHARS} characters.")
        if source.startswith(SCHEME):
            if self._hub is None:
                raise SourceRefused("This server does not fetch from the Hub; upload the adapter.")
            return self._hub.fetch(source, into, self.max_bytes)
        if scheme := _ADDRESS.match(source):
            raise SourceRefused(
                f"{scheme[0]!r} addresses are not fetched. Upload the adapter, or name a path below an allowed root or "
                "hf://org/repo."
            )
        path = Path(source).resolve()
        self._check_allowed(path)
        self._copy(path, into, trusted=False)
        return str(path)

    def fetch_trusted(self, path: Path, into: Path) -> str:
        """As ``fetch``, for a local path that the operator gave on the command line: no allowed root is needed."""
        path = path.resolve()
        self._copy(path, into, trusted=True)
        return str(path)

    def _check_allowed(self, path: Path) -> None:
        if not any(path.is_relative_to(root) for root in self.allowed_roots):
            raise SourceRefused(
                "The path is not below an allowed root. Upload the adapter, or have the operator allow its folder."
            )

    def _copy(self, path: Path, into: Path, *, trusted: bool) -> None:
        if path.is_dir():
            refuse_other_weights(sorted(file.name for file in path.iterdir()))
            left = self.max_bytes
            for name in KEPT_NAMES:
                file = (path / name).resolve()  # files in the Hub's cache are links
                if not file.exists():
                    continue
                if not trusted:
                    self._check_allowed(file)
                left -= _copy_file(file, into / name, left)
        elif path.is_file():
            with _open_regular(path) as archive:
                unpack_archive(archive, into, max_bytes=self.max_bytes)
        else:
            raise InvalidAdapter(f"{str(path)[-200:]!r} is neither a folder nor an archive.", code="source_not_found")


def _open_regular(path: Path) -> BinaryIO:
    """Open a file that is neither a link, a pipe nor a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidAdapter(f"{path.name!r} cannot be read: {error.strerror}.", code="source_unreadable") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidAdapter(f"{path.name!r} is not a regular file.", code="source_unreadable")
    return os.fdopen(descriptor, "rb")


def _copy_file(path: Path, target: Path, max_bytes: int) -> int:
    """Copy a regular file of at most ``max_bytes``; its size."""
    num_bytes = 0
    with _open_regular(path) as source, target.open("xb") as copy:
        while chunk := source.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise AdapterTooLarge(
                    f"{path.name!r} is larger than the {max_bytes} bytes left for it by this server's limit."
                )
            copy.write(chunk)
    return num_bytes
