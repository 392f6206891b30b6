"""What a measurement leaves behind: lines while it runs, a table, a CSV and a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplex_server.bench.plot import NoMatplotlib
from loraplex_server.bench.record import circumstances, write_csv

Row = dict[str, Any]

PACKAGES = ("loraplex", "triton", "transformers", "peft", "bitsandbytes", "vllm")
"""Whose versions every row names, where they are installed."""


@dataclass(frozen=True)
class Column:
    """One column of the table; ``digits`` for numbers."""

    title: str
    key: str
    digits: int = 2


@dataclass
class Output:
    """Shows rows as they come and writes all of them to ``folder``/``name``.csv and .png."""

    folder: Path
    name: str
    columns: Sequence[Column]
    console: Console = field(default_factory=lambda: a_console())
    rows: list[Row] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something that is not a row."""
        self.console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def add(self, row: Row) -> None:
        """Show one row in a line; a run that breaks off has at least said what it knew."""
        self.rows.append(row)
        parts = [f"{column.title} {_cell(row.get(column.key, ''), column.digits)}" for column in self.columns[1:]]
        named = [part for part in parts if not part.endswith(" ")]
        self.note(f"  {row[self.columns[0].key]}: {', '.join(named)}")

    def finish(self, draw: Callable[[Sequence[Row], Path], Path]) -> None:
        """The table, the CSV and the picture."""
        if not self.rows:
            return
        self.show_table(self.columns, self.rows)
        where = circumstances(PACKAGES)
        for row in self.rows:
            row |= where
        write_csv(self.folder / f"{self.name}.csv", self.rows)
        self.note(f"wrote {self.folder / self.name}.csv")
        try:
            self.note(f"wrote {draw([dict(row) for row in self.rows], self.folder / f'{self.name}.png')}")
        except NoMatplotlib as error:
            self.note(str(error))

    def show_table(self, columns: Sequence[Column], rows: Sequence[Row]) -> None:
        """Rows under the titles of those columns that say something."""
        shown = [column for column in columns if any(row.get(column.key, "") != "" for row in rows)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in shown:
            table.add_column(column.title, justify="left" if column is shown[0] else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(row.get(column.key, ""), column.digits)) for column in shown))
        self.console.print(table)


def a_console() -> Console:
    """A terminal's own width; room for whole rows in a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _cell(value: object, digits: int) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, float) else str(value)
