"""Reading a tar stream, forward only and in bounded memory.

The standard library's reader takes a header's announced size into memory and resolves links; a few kilobytes can make
it take gigabytes. This one knows files, directories and long names, and refuses everything else by name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loraplex_adapters.errors import InvalidAdapter

BLOCK_BYTES = 512
_MAX_EXTENDED_BYTES = 1 << 16
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"K": "a link with a long target",
    b"S": "a sparse file",
}

ReadExactly = Callable[[int], bytes]
"""Reads exactly that many bytes, or fewer only where the stream ends."""


@dataclass(frozen=True)
class TarMember:
    """A file or directory; the ``size`` bytes that follow in the stream are its content."""

    name: str
    size: int
    is_directory: bool


def tar_members(read: ReadExactly) -> Iterator[TarMember]:
    """The members of a tar stream. The caller reads each member's ``size`` bytes before it asks for the next one.

    Raises: InvalidAdapter for links, devices, sparse files and whatever is damaged.
    Source: POSIX.1-2001 ustar and pax, and the long names of GNU tar.
    """
    path: str | None = None
    size: int | None = None
    while True:
        block = read(BLOCK_BYTES)
        if not block.strip(b"\0"):
            return
        if len(block) < BLOCK_BYTES or _checksum(block) != _number(block[148:156]):
            raise _broken("a header is damaged or cut off")
        kind, length = block[156:157], _number(block[124:136])
        if kind == b"L":
            path = _text(_extended(read, length).rstrip(b"\0"))
        elif kind in (b"x", b"g"):
            records = _pax_records(_extended(read, length))
            if kind == b"g" and not records.keys().isdisjoint({b"path", b"size"}):
                raise _broken("a global header renames files")
            if kind == b"x":
                path = _text(records[b"path"]) if b"path" in records else path
                size = _decimal(records[b"size"]) if b"size" in records else size
        elif kind in (b"0", b"\0", b"7", b"5"):
            name = path if path is not None else _header_name(block)
            is_directory = kind == b"5" or (kind == b"\0" and name.endswith("/"))
            member = TarMember(name, 0 if is_directory else (length if size is None else size), is_directory)
            path = size = None
            yield member
            padding = -member.size % BLOCK_BYTES
            if len(read(padding)) < padding:
                raise _broken("it is cut off")
        else:
            what = _REFUSED.get(kind, f"a member of type {kind!r}")
            raise InvalidAdapter(
                f"The archive holds {what} ({_header_name(block)[:80]!r}); only files and directories are taken.",
                code="archive_unsafe",
            )


def _broken(why: str) -> InvalidAdapter:
    return InvalidAdapter(f"The tar archive cannot be read: {why}.", code="archive_broken")


def _checksum(block: bytes) -> int:
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if value >= 1 << 62:
            raise _broken("a size is absurd")
        return value
    digits = field.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):
        raise _broken("a header is damaged")
    return int(digits, 8)


def _decimal(field: bytes) -> int:
    if not field.isdigit() or len(field) > 18:
        raise _broken("a size is absurd")
    return int(field)


def _header_name(block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _broken("a name is not UTF-8") from None


def _extended(read: ReadExactly, length: int) -> bytes:
    if length > _MAX_EXTENDED_BYTES:
        raise _broken(f"an extended header of {length} bytes is larger than {_MAX_EXTENDED_BYTES}")
    content = read(length + -length % BLOCK_BYTES)
    if len(content) < length:
        raise _broken("it is cut off")
    return content[:length]


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    while content.strip(b"\0"):
        head, _, _ = content.partition(b" ")
        if not head.isdigit() or len(head) > 6 or not len(head) + 1 < int(head) <= len(content):
            raise _broken("an extended header is damaged")
        record, content = content[: int(head)], content[int(head) :]
        key, separator, value = record[len(head) + 1 : -1].partition(b"=")
        if not separator or not record.endswith(b"\n"):
            raise _broken("an extended header is damaged")
        if key.startswith(b"GNU.sparse"):
            raise InvalidAdapter("The archive holds a sparse file; pack it again without.", code="archive_unsafe")
        records[key] = value
    return records
