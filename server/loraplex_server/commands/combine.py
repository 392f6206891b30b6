"""`loraplex adapters combine`: one new adapter out of several, offline."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .connection import EXIT_REFUSED, fail
from .rendering import print_table

if TYPE_CHECKING:
    from loraplex_adapters.combine import Combination


class Method(StrEnum):
    """The names of loraplex_adapters.combine.CombineMethod, here so that --help does not import torch."""

    CONCAT = "concat"
    SVD = "svd"
    TIES = "ties"
    DARE = "dare"
    MAGNITUDE_PRUNE = "magnitude-prune"


def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(help="PEFT folders, each with an optional weight: FOLDER[:WEIGHT].", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The new adapter's folder; must not exist yet.", show_default=False)],
    method: Annotated[
        Method,
        typer.Option(
            help="concat is exact and adds the ranks up; svd cuts the sum to --rank with the least error; ties, dare and "
            "magnitude-prune are approximate, made to lessen interference."
        ),
    ] = Method.CONCAT,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The new rank, for all methods but concat; the parts' largest if left out."),
    ] = None,
    density: Annotated[
        float, typer.Option(help="The share of entries that ties, dare and magnitude-prune keep, up to 1.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of dare's random choice.")] = 0,
) -> None:
    """Make one adapter out of several PEFT folders, and say how far it is from their exact sum.

    Weights scale an adapter's update and may be negative, which takes it away.

    Example: loraplex adapters combine ./pirate:0.7 ./json:0.5 --out ./pirate-json

    Example: loraplex adapters combine ./a ./b ./c --method svd --rank 16 --out ./abc
    """
    if out.exists():
        fail(f"{out} exists already; name a new folder", EXIT_REFUSED)
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from loraplex_adapters.combine import CombineMethod, Part
    from loraplex_adapters.combine import combine as combine_parts
    from loraplex_adapters.errors import AdapterError
    from loraplex_adapters.format import read_layout, read_trusted, write

    parts, bases = [], set()
    for spec in adapters:
        folder, weight = split_weight(spec)
        try:
            layout = read_layout(folder)
            parts.append(Part(read_trusted(folder, layout), weight))
        except (AdapterError, OSError) as error:
            fail(f"{folder}: {error}", EXIT_REFUSED)
        bases.add(layout.config.base_model_name)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task(f"combining by {method}")
        try:
            made = combine_parts(
                parts,
                CombineMethod(method),
                rank=rank,
                density=density,
                seed=seed,
                on_module=lambda _, done, total: progress.update(task, completed=done, total=total),
            )
        except AdapterError as error:
            fail(str(error), EXIT_REFUSED)
    write(out, made.weights, base_model_name=bases.pop() if len(bases) == 1 else None)
    _report(out, method, made)


def split_weight(spec: str) -> tuple[Path, float]:
    """FOLDER or FOLDER:WEIGHT; a folder whose own name ends so wins."""
    if not Path(spec).exists() and ":" in spec:
        folder, _, number = spec.rpartition(":")
        try:
            return Path(folder), float(number)
        except ValueError:
            fail(f"{number!r} in {spec!r} is no weight; write FOLDER:0.5, say", EXIT_REFUSED)
    return Path(spec), 1.0


def _report(out: Path, method: Method, made: Combination) -> None:
    by_linear: dict[str, list[tuple[int, float, float]]] = {}
    for (_, linear), error in made.errors.items():
        by_linear.setdefault(linear, []).append((error.rank, error.error, error.discarded))
    print_table(
        ["linear", "layers", "rank", "error, mean", "error, worst", "cut to the rank"],
        [
            [
                linear,
                str(len(rows)),
                _span([rank for rank, _, _ in rows]),
                f"{sum(error for _, error, _ in rows) / len(rows):.2%}",
                f"{max(error for _, error, _ in rows):.2%}",
                f"{max(cut for _, _, cut in rows):.2%}",
            ]
            for linear, rows in by_linear.items()
        ],
    )
    if method is Method.CONCAT:
        typer.echo(f"{out} holds the exact sum of its parts (rounding: {made.error:.1e}).")
    else:
        typer.echo(
            f"{out} is an approximation: at worst {made.error:.1%} away from the exact sum of its parts (Frobenius norm of a "
            "linear's update). Compare both on your task, or use concat, which is exact."
        )


def _span(ranks: list[int]) -> str:
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
