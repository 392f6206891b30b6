"""The files of one adapter upload: checked before anything is sent, read from disk while it is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import LocalAdapterError

FormFile = tuple[str, tuple[str, BinaryIO, str]]
"""httpx's form: (field, (file name, open file, content type))."""

CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What to upload: `paths` go into form field `field`; `default_name` names the adapter if the caller does not."""

    field: str
    paths: tuple[Path, ...]
    default_name: str

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> AdapterFiles:
        """The adapter in a PEFT directory, or in an archive of one.

        From a directory go the config, the weights and the model card: a trainer's checkpoint also holds
        optimizer state and pickles, which the server refuses, and perhaps the whole base.

        Raises LocalAdapterError: no such path, no adapter in it, or not an archive that the server reads.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            return cls("files", _directory_files(path), path.resolve().name)
        if not path.exists():
            raise LocalAdapterError(f"{path} does not exist")
        for suffix in ARCHIVE_SUFFIXES:
            if path.name.lower().endswith(suffix) and path.is_file():
                return cls("file", (path,), path.name[: -len(suffix)])
        raise LocalAdapterError(
            f"{path} is neither an adapter's directory nor an archive of one ({', '.join(ARCHIVE_SUFFIXES)})"
        )

    @contextmanager
    def open(self) -> Iterator[list[FormFile]]:
        """Open all files for one call, its retries included: httpx reads each from its start, 64 KiB at a time.

        Raises LocalAdapterError: a file cannot be read.
        """
        with ExitStack() as stack:
            try:
                opened = [(path, stack.enter_context(path.open("rb"))) for path in self.paths]
            except OSError as error:
                raise LocalAdapterError(f"cannot read {error.filename}: {error.strerror}") from error
            yield [(self.field, (path.name, file, "application/octet-stream")) for path, file in opened]


def _directory_files(directory: Path) -> tuple[Path, ...]:
    config = directory / CONFIG_FILE
    if not config.is_file():
        raise LocalAdapterError(
            f"{directory} holds no {CONFIG_FILE}; give the folder that PEFT's save_pretrained wrote"
        )
    weights = sorted(path for path in directory.glob("adapter_model*.safetensors") if path.is_file())
    if not weights:
        raise LocalAdapterError(
            f"{directory} holds no adapter_model.safetensors; save it with safe_serialization=True, other formats are not loaded"
        )
    card = directory / CARD_FILE
    return (config, *weights, card) if card.is_file() else (config, *weights)
