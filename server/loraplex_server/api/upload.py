"""Receives a multipart upload onto the disk while it arrives, counting what it takes."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from loraplex_adapters.errors import AdapterTooLarge
from loraplex_server.errors import ApiError

MAX_FILES = 1_000
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096

# Boundaries and part headers come on top of the files themselves.
_FORM_BYTES = 1 << 20
# Parsing and writing happen in pieces of this size on a thread, so that neither the loop nor the memory notices an upload.
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class UploadedFile:
    """``field``: the form's name for it. ``filename``: as the client said, unchecked. ``path``: where it was put."""

    field: str
    filename: str
    path: Path


@dataclass
class Upload:
    """A form as received."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[UploadedFile] = field(default_factory=list)


def declared_bytes(request: Request) -> int:
    """The length that the request's head claims; 0 if it claims none."""
    declared = request.headers.get("content-length", "")
    return int(declared[:20]) if declared.isascii() and declared.isdigit() else 0


async def receive_upload(request: Request, into: Path, max_bytes: int) -> Upload:
    """Write the files of a multipart body into the folder ``into``, which the caller removes.

    Raises: AdapterTooLarge (more than ``max_bytes`` declared or sent), ApiError (400: not a form, or cut off), OSError.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 256:
        raise ApiError(
            "The multipart body names no boundary; let the HTTP client set content-type.", code="invalid_form"
        )
    if declared_bytes(request) > max_bytes + _FORM_BYTES:
        raise _too_large(max_bytes)
    form = _Form(boundary, into, max_bytes)
    try:
        async for piece in _pieces(request):
            await asyncio.to_thread(form.write, piece)
        return form.finish()
    except FormParserError as error:
        raise ApiError(f"The multipart body is broken: {error}.", code="invalid_form") from None
    except ClientDisconnect:
        raise ApiError("The upload ended early.", code="invalid_form") from None
    finally:
        form.close()


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    piece = bytearray()
    async for chunk in request.stream():
        piece += chunk
        if len(piece) >= _PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def _too_large(max_bytes: int) -> AdapterTooLarge:
    return AdapterTooLarge(f"The upload has more than the {max_bytes} bytes that an adapter may take on this server.")


class _Form:
    """Takes a multipart body piece by piece: small fields into memory, files onto the disk."""

    def __init__(self, boundary: bytes, into: Path, max_bytes: int) -> None:
        self._into = into
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._upload = Upload()
        self._ended = False
        self._file: BinaryIO | None = None
        self._name = ""
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_name_arrives,
                "on_header_value": self._header_value_arrives,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data_arrives,
                "on_part_end": self._part_ends,
                "on_end": self._body_ends,
            },
            max_size=max_bytes + _FORM_BYTES,
        )

    def write(self, piece: bytes) -> None:
        self._num_bytes += len(piece)
        if self._num_bytes > self._max_bytes + _FORM_BYTES:
            raise _too_large(self._max_bytes)
        self._parser.write(piece)

    def finish(self) -> Upload:
        self._parser.finalize()
        if not self._ended:
            raise ApiError("The multipart body ends before its last boundary.", code="invalid_form")
        return self._upload

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _part_begins(self) -> None:
        self._headers = {}

    def _header_name_arrives(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value_arrives(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_ends(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode("utf-8", errors="replace")
        filename = options.get(b"filename")
        if filename is None:
            self._begin_field()
        else:
            self._begin_file(filename.decode("utf-8", errors="replace"))

    def _begin_field(self) -> None:
        self._value.clear()
        if self._name in self._upload.fields:
            raise ApiError(
                f"The field `{self._name[:64]}` is there twice.", param=self._name[:64], code="invalid_value"
            )
        if len(self._upload.fields) >= MAX_FIELDS:
            raise ApiError(f"The form has more than {MAX_FIELDS} fields.", code="invalid_form")

    def _begin_file(self, filename: str) -> None:
        files = self._upload.files
        if len(files) >= MAX_FILES:
            raise AdapterTooLarge(f"The upload holds more than {MAX_FILES} files.", code="too_many_files")
        path = self._into / f"{len(files)}.part"
        self._file = path.open("xb")
        files.append(UploadedFile(self._name, filename, path))

    def _data_arrives(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise ApiError(
                f"The field `{self._name[:64]}` has more than {MAX_FIELD_BYTES} bytes; send files with a file name.",
                param=self._name[:64],
                code="invalid_value",
            )

    def _part_ends(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        else:
            self._upload.fields[self._name] = self._value.decode("utf-8", errors="replace")

    def _body_ends(self) -> None:
        self._ended = True
