"""Taking uploads apart: archives and sets of files that can neither escape their folder nor explode in it."""

import contextlib
import gzip
import re
import stat
import struct
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from loraplex_adapters.errors import AdapterTooLarge, InvalidAdapter
from loraplex_adapters.tar_stream import tar_members

MAX_FILES = 1_000
MAX_RATIO = 100.0

_CHUNK_BYTES = 1 << 18
_FREE_BYTES = 1 << 20  # below this the ratio is not judged: a small JSON file compresses well
_MAX_DIRECTORY_BYTES = 1 << 20
_MAX_DEPTH = 8
_MAX_PART_BYTES = 200
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\\:]")

_Read = Callable[[int], bytes]


class _Intake:
    """Writes files below one folder while counting what they take."""

    def __init__(self, into: Path, max_bytes: int, max_files: int, max_inflated: float) -> None:
        self.into = into
        self.max_bytes = max_bytes
        self.max_files = max_files
        self.max_inflated = max_inflated
        self.num_bytes = 0
        self.num_files = 0

    def spend(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes:
            raise AdapterTooLarge(f"The adapter takes more than the {self.max_bytes} bytes allowed here.")
        if self.num_bytes > self.max_inflated:
            raise InvalidAdapter(
                "The archive unpacks to far more than its own size, as no adapter does; pack it again.",
                code="archive_ratio",
            )

    def enter(self, name: str) -> Path | None:
        """Where a member goes, or None for the folder itself and for desktop litter."""
        self.num_files += 1
        if self.num_files > self.max_files:
            raise AdapterTooLarge(f"The upload holds more than {self.max_files} files.", code="too_many_files")
        parts = _safe_parts(name)
        if not parts or "__MACOSX" in parts or parts[-1].startswith("._") or parts[-1] == ".DS_Store":
            return None
        return self.into.joinpath(*parts)

    def directory(self, name: str) -> None:
        if path := self.enter(name):
            with _clashes_named(name):
                path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, chunks: Iterator[bytes]) -> None:
        path = self.enter(name)
        if path is None:
            for _ in chunks:
                pass
            return
        with _clashes_named(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            target = path.open("xb")
        with target:
            for chunk in chunks:
                target.write(chunk)


@contextmanager
def _clashes_named(name: str) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise _unsafe(name, "it is there twice") from None


def _unsafe(name: str, why: str) -> InvalidAdapter:
    return InvalidAdapter(f"The upload's member {name[:80]!r} is refused: {why}.", code="archive_unsafe")


def _safe_parts(name: str) -> list[str]:
    if name.startswith("/") or _UNPRINTABLE.search(name):
        raise _unsafe(name, "names must be relative, without control characters, backslashes or colons")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _unsafe(name, "names must not contain '..'")
    try:
        longest = max((len(part.encode()) for part in parts), default=0)
    except UnicodeEncodeError:
        raise _unsafe(name, "names must be UTF-8") from None
    if len(parts) > _MAX_DEPTH or longest > _MAX_PART_BYTES:
        raise _unsafe(name, f"names go at most {_MAX_DEPTH} folders deep and {_MAX_PART_BYTES} bytes a part")
    return parts


def unpack_archive(
    archive: Path | BinaryIO,
    into: Path,
    *,
    max_bytes: int,
    max_ratio: float = MAX_RATIO,
    max_files: int = MAX_FILES,
) -> None:
    """Unpack a .zip, .tar or .tar.gz, told apart by content, into the empty folder ``into``.

    One folder around everything is stripped. Files inside that are archives stay packed. ``archive`` must be seekable.

    Raises: InvalidAdapter (``archive_unsafe``, ``archive_ratio``, ``archive_broken``, ``archive_unknown``) or
    AdapterTooLarge; ``into`` may then hold part of the content.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(archive.open("rb")) if isinstance(archive, Path) else archive
        file.seek(0, 2)
        packed_bytes = file.tell()
        intake = _Intake(into, max_bytes, max_files, max(_FREE_BYTES, packed_bytes * max_ratio))
        file.seek(0)
        magic = file.read(265)
        file.seek(0)
        try:
            if magic[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                _unpack_zip(file, packed_bytes, intake)
            elif magic[:2] == b"\x1f\x8b":
                _unpack_tar(gzip.GzipFile(fileobj=file, mode="rb").read, intake)
            elif magic[257:262] == b"ustar":
                _unpack_tar(file.read, intake)
            else:
                raise InvalidAdapter("The upload is no .zip, .tar or .tar.gz archive.", code="archive_unknown")
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
            raise InvalidAdapter(f"The archive is damaged: {str(error)[:120]}.", code="archive_broken") from None
    _strip_top_folder(into)


def _unpack_tar(read: _Read, intake: _Intake) -> None:
    def read_exactly(num_bytes: int) -> bytes:
        pieces = []
        while num_bytes and (piece := read(min(num_bytes, _CHUNK_BYTES))):
            intake.spend(len(piece))
            pieces.append(piece)
            num_bytes -= len(piece)
        return b"".join(pieces)

    for member in tar_members(read_exactly):
        if member.is_directory:
            intake.directory(member.name)
        else:
            intake.file(member.name, _sized_chunks(read_exactly, member.size))


def _sized_chunks(read: _Read, size: int) -> Iterator[bytes]:
    while size:
        chunk = read(min(size, _CHUNK_BYTES))
        if not chunk:
            raise EOFError("it is cut off")
        size -= len(chunk)
        yield chunk


def _unpack_zip(file: BinaryIO, packed_bytes: int, intake: _Intake) -> None:
    _check_zip_directory(file, packed_bytes, intake.max_files)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _unsafe(info.filename, "it is a link or a device")
            if "\0" in info.orig_filename:
                raise _unsafe(info.filename, "its name holds a zero byte")
            if info.flag_bits & 0x1:
                raise _unsafe(info.filename, "it is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _unsafe(info.filename, "it is neither stored nor deflated")
            if not info.filename:
                raise _unsafe(info.orig_filename, "it has no name")
            if info.filename.endswith("/"):
                intake.directory(info.filename)
                continue
            with archive.open(info) as member:
                intake.file(info.filename, _counted_chunks(member.read, intake))


def _counted_chunks(read: _Read, intake: _Intake) -> Iterator[bytes]:
    while chunk := read(_CHUNK_BYTES):
        intake.spend(len(chunk))
        yield chunk


def _check_zip_directory(file: BinaryIO, packed_bytes: int, max_files: int) -> None:
    """Judge the zip's own table of contents before the library takes it into memory."""
    tail_bytes = min(packed_bytes, 22 + (1 << 16) + 20)
    file.seek(packed_bytes - tail_bytes)
    tail = file.read(tail_bytes)
    at = len(tail) - 22 if tail[-22:-18] == b"PK\x05\x06" and tail[-2:] == b"\0\0" else tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise zipfile.BadZipFile("it has no table of contents")
    num_entries, directory_bytes = struct.unpack_from("<HL", tail, at + 10)
    if tail[max(at - 20, 0) :].startswith(b"PK\x06\x07"):
        raise AdapterTooLarge("The zip archive uses 64-bit fields; pack it as .tar or .tar.gz.", code="archive_zip64")
    if num_entries > max_files or directory_bytes > _MAX_DIRECTORY_BYTES:
        raise AdapterTooLarge(f"The upload holds more than {max_files} files.", code="too_many_files")
    file.seek(0)


def write_files(
    files: Iterable[tuple[str, BinaryIO]], into: Path, *, max_bytes: int, max_files: int = MAX_FILES
) -> None:
    """Write named streams into the empty folder ``into``, under the same rules as an archive's members.

    Raises: InvalidAdapter (``archive_unsafe``) or AdapterTooLarge; ``into`` may then hold part of the content.
    """
    intake = _Intake(into, max_bytes, max_files, max_inflated=float("inf"))
    for name, stream in files:
        intake.file(name, _counted_chunks(stream.read, intake))
    _strip_top_folder(into)


def _strip_top_folder(into: Path) -> None:
    entries = list(into.iterdir())
    if len(entries) != 1 or not entries[0].is_dir():
        return
    top = entries[0].rename(into / uuid.uuid4().hex)
    for path in top.iterdir():
        path.rename(into / path.name)
    top.rmdir()
