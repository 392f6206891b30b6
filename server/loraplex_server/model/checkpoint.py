"""A checkpoint folder's safetensors files as one index of tensors. Nothing but safetensors is ever opened."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from loraplex_server.model.errors import BadCheckpoint

_DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_INDEX_FILE: Final = "model.safetensors.index.json"
_SINGLE_FILE: Final = "model.safetensors"
_MAX_HEADER_BYTES: Final = 100_000_000
_NUM_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie: ``num_bytes`` at ``offset`` of ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one checkpoint by name, and the files they lie in."""

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Index ``folder``: model.safetensors, or the shards of model.safetensors.index.json.

        Raises: BadCheckpoint when there are none, or headers, sizes and index disagree.
        """
        if (folder / _SINGLE_FILE).is_file():
            entries = _read_header(folder / _SINGLE_FILE)
            return cls(entries, (folder / _SINGLE_FILE,))
        if (folder / _INDEX_FILE).is_file():
            return cls._open_shards(folder)
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise BadCheckpoint(
                f"{folder} holds its weights as pickle ({pickles[0]}), which is never opened; convert it to safetensors"
            )
        raise BadCheckpoint(f"{folder} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")

    @classmethod
    def _open_shards(cls, folder: Path) -> "Checkpoint":
        try:
            weight_map: dict[str, str] = json.loads((folder / _INDEX_FILE).read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{_INDEX_FILE} has no readable weight_map") from error
        headers: dict[str, dict[str, TensorEntry]] = {}
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise BadCheckpoint(f"{_INDEX_FILE} names the shard {name!r}, which is not in the folder")
            headers[name] = _read_header(folder / name)
        absent = [tensor for tensor, name in weight_map.items() if tensor not in headers[name]]
        if absent:
            raise BadCheckpoint(f"{_INDEX_FILE} names tensors that their shards lack: {', '.join(absent[:5])}")
        entries = {tensor: headers[name][tensor] for tensor, name in weight_map.items()}
        return cls(entries, tuple(folder / name for name in names))

    def content_digest(self) -> str:
        """sha256 over each file's size, every tensor's name, dtype and shape, and 16 samples of 4 KiB a file.

        It costs milliseconds and tells fine-tunes of one architecture apart; it is an identity, not a proof of
        integrity.
        """
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{size}\n".encode())
            with file.open("rb") as stream:
                for i in range(_NUM_SAMPLES):
                    stream.seek((size - min(size, _SAMPLE_BYTES)) * i // (_NUM_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, every size checked against dtype, shape and the file."""
    size = os.path.getsize(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise BadCheckpoint(f"{path.name} is not a safetensors file, or is cut short")
        try:
            header = json.loads(stream.read(length))
            return {
                name: _entry(path, name, raw, 8 + length, size)
                for name, raw in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"the safetensors header of {path.name} cannot be read: {error}") from error


def _entry(path: Path, name: str, raw: dict[str, Any], data_start: int, size: int) -> TensorEntry:
    dtype, shape = _DTYPES.get(raw["dtype"]), tuple(raw["shape"])
    if dtype is None:
        raise BadCheckpoint(f"{name} in {path.name} has the unknown dtype {raw['dtype']}")
    start, stop = raw["data_offsets"]
    num_bytes = dtype.itemsize
    for dim in shape:
        num_bytes *= dim
    if min((*shape, start), default=0) < 0 or stop - start != num_bytes or data_start + stop > size:
        raise BadCheckpoint(
            f"{name} in {path.name} lies outside the file or does not fill its shape; download it again"
        )
    return TensorEntry(path, dtype, shape, data_start + start, num_bytes)
