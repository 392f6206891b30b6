"""`loraplex merge`: a plain checkpoint with an adapter, or a mix of them, folded in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .combine import split_weight
from .connection import EXIT_REFUSED, fail
from .rendering import size


class Precision(StrEnum):
    """The names of loraplex_server.model.export.Precision, here so that --help does not import torch."""

    BF16 = "bf16"
    NF4 = "nf4"


class Start(StrEnum):
    """The names of loraplex_server.model.export.Start."""

    NF4 = "nf4"
    STORED = "stored"


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(help="PEFT folders, each with an optional weight: FOLDER[:WEIGHT].", show_default=False),
    ],
    model: Annotated[str, typer.Option(help="The base: a folder or a Hub id, or demo.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new checkpoint's folder; must not exist yet.", show_default=False)],
    precision: Annotated[
        Precision,
        typer.Option(help="bf16, or nf4: re-quantized as bitsandbytes stores it, which rounds the update too."),
    ] = Precision.BF16,
    onto: Annotated[
        Start,
        typer.Option(
            help="What the update is added to: the weights as NF4 rounds them, which is what adapters are served on (and "
            "QLoRA trains on), or as stored."
        ),
    ] = Start.NF4,
    device: Annotated[str, typer.Option(help="Where linears are folded: cpu or cuda.")] = "cpu",
) -> None:
    """Fold adapters into their base and write a checkpoint that transformers and vLLM load without them.

    Shards are streamed: memory holds one of 2 GB and one matrix at a time, whatever the model's size.

    Examples:

    loraplex merge ./adapters/sql --model meta-llama/Llama-3.1-8B-Instruct --out ./llama-sql

    loraplex merge ./pirate:0.7 ./json:0.5 --model ./my-model --precision nf4 --out ./my-model-nf4
    """
    if out.exists():
        fail(f"{out} exists already; name a new folder", EXIT_REFUSED)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from loraplex_adapters.combine import Part
    from loraplex_adapters.errors import AdapterError
    from loraplex_adapters.fold import check_foldable, fold
    from loraplex_adapters.format import read
    from loraplex_server.model import export as exporting
    from loraplex_server.model.base_shape import base_shape
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.source import resolve
    from loraplex_server.model.spec import ModelSpec

    try:
        folder = _demo() if model == "demo" else resolve(model)
        # Only shapes are compared: a PEFT folder does not say which weights it was trained on.
        base = base_shape(ModelSpec.from_folder(folder), fingerprint="")
        parts = []
        for spec in adapters:
            path, weight = split_weight(spec)
            parts.append(Part(read(path, base), weight))
        check_foldable(parts)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task("merging")
            done = exporting.export(
                folder,
                out,
                lambda linear, weight: fold(linear, weight, parts),
                precision=exporting.Precision(precision),
                start=exporting.Start(onto),
                device=device,
                progress=lambda now, total: progress.update(task, completed=now, total=total),
            )
    except (AdapterError, ModelError, OSError) as error:
        fail(str(error), EXIT_REFUSED)
    typer.echo(
        f"{out}: {done.num_changed} linears changed, {size(done.num_bytes)} in {done.num_shards} "
        f"shard{'s' if done.num_shards > 1 else ''}. Writing them as {precision} moved a changed linear by "
        f"{done.rounding:.2%} at worst."
    )


def _demo() -> Path:
    from loraplex_server.demo import DEMO_MODEL

    return DEMO_MODEL
