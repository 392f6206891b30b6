"""How answers look in a terminal, and in a script."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel


def print_json(answer: BaseModel | Sequence[BaseModel]) -> None:
    """Print the server's answer as it came, unknown fields included."""
    if isinstance(answer, Sequence):
        value: object = [item.model_dump(mode="json") for item in answer]
    else:
        value = answer.model_dump(mode="json")
    typer.echo(json.dumps(value, indent=2))


def print_table(header: list[str] | None, rows: list[list[str]]) -> None:
    """Print rows under a header, or pairs without one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if header else None, show_header=header is not None, pad_edge=False)
    for title in header or ["", ""]:
        table.add_column(title, overflow="fold")
    for row in rows:
        # Text, not markup: names come from other people.
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        # Piped into grep or a file, a row stays on its line.
        console = Console(width=200)
    console.print(table)


def printable(text: str) -> str:
    """The text without control characters (but newlines and tabs): it must not drive the reader's terminal."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")


def size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"


def short_digest(digest: str) -> str:
    """Enough of a digest to tell versions apart."""
    return digest.removeprefix("sha256:")[:12]


def local_time(unix_s: float) -> str:
    """A Unix time in the reader's zone; empty for zero."""
    from datetime import datetime

    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S") if unix_s else ""
