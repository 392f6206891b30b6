"""A strict reading of a safetensors header, before any tensor's memory is taken."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_adapters.errors import InvalidAdapter, UnsupportedAdapter

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
MAX_NAME_CHARS = 512
MAX_DIMS = 8
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file. ``begin`` and ``end`` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, every offset checked against the file's real size.

    Raises: InvalidAdapter or UnsupportedAdapter with the reason.
    Source: the safetensors format; stricter than its library: at most 1 MiB of header and 10,000 tensors.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _broken(path, f"it has {size} bytes, fewer than the 8 that every safetensors file begins with")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise InvalidAdapter(
                f"{path.name} announces a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed. "
                "A LoRA adapter's header takes some 100 bytes a tensor: save it again with peft.",
                code="header_too_large",
            )
        if 8 + length > size:
            raise _broken(path, f"its header of {length} bytes ends after the file does; upload the whole file")
        raw = file.read(length)
    return _tensors(path, _parse(path, raw), 8 + length, size)


def _broken(path: Path, why: str) -> InvalidAdapter:
    return InvalidAdapter(f"{path.name} is not a valid safetensors file: {why}.", code="weights_broken")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header cannot be read ({str(error)[:120]})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _broken(path, "its __metadata__ is not a JSON object")
    if len(header) > MAX_TENSORS:
        raise InvalidAdapter(
            f"{path.name} holds {len(header)} tensors; at most {MAX_TENSORS} are allowed.", code="too_many_tensors"
        )
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _tensors(path: Path, header: Mapping[str, Any], start: int, size: int) -> dict[str, TensorInfo]:
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    expected = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != expected:
            word = "overlaps the tensor before it" if info.begin < expected else "leaves a gap before it"
            raise _broken(path, f"tensor {name!r} {word}")
        expected = info.end
    if expected != size:
        word = "short" if expected > size else "long"
        raise _broken(path, f"it is {abs(expected - size)} bytes too {word}; upload the whole file")
    return tensors


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if len(name) > MAX_NAME_CHARS:
        raise _broken(path, f"tensor {name[:80]!r}... has a name of {len(name)} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UnsupportedAdapter(
            f"Tensor {name!r} has dtype {str(dtype)[:20]!r}; adapters are read in {', '.join(DTYPE_BYTES)}.",
            code="dtype_unsupported",
        )
    if not _counts(shape) or len(shape) > MAX_DIMS:
        raise _broken(path, f"tensor {name!r} has no valid shape")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"tensor {name!r} has no valid data_offsets")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if num_bytes != offsets[1] - offsets[0]:
        raise _broken(path, f"tensor {name!r} of shape {shape} takes {num_bytes} bytes but is given {offsets}")
    return TensorInfo(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _counts(value: Any) -> bool:
    """Whether ``value`` is a list of plain non-negative integers below 2**63."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
