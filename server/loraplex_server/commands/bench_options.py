"""What the subcommands of `loraplex bench` have in common: options, and how lists and mistakes are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from loraplex_server.commands.connection import EXIT_REFUSED, EXIT_USAGE, fail

if TYPE_CHECKING:
    from loraplex_server.bench.rig import BaseChoice

T = TypeVar("T")


class Shape(StrEnum):
    """The names of loraplex_server.bench.shapes.SHAPES, here so that --help does not import torch."""

    LLAMA_8B = "llama-8b"
    QWEN_7B = "qwen2.5-7b"
    QWEN_1B = "qwen2.5-1.5b"
    QWEN_HALF_B = "qwen2.5-0.5b"
    TINY = "tiny"


class Device(StrEnum):
    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class Quantization(StrEnum):
    NF4 = "nf4"
    NONE = "none"


class Dtype(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


ShapeOption = Annotated[Shape, typer.Option(help="Whose shape the random base has.", rich_help_panel="Base")]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        help="A model on this machine instead of random weights; adapters stay random.",
        show_default=False,
        rich_help_panel="Base",
    ),
]
QuantizationOption = Annotated[Quantization, typer.Option(help="How the base is held.", rich_help_panel="Base")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of activations and adapters.", rich_help_panel="Base")]
DeviceOption = Annotated[Device, typer.Option(help="auto: the GPU if there is one.", rich_help_panel="Base")]
CheckpointOption = Annotated[
    bool,
    typer.Option(
        "--checkpoint", help="Write the base to disk and load it, to time the loading too.", rich_help_panel="Base"
    ),
]
RanksOption = Annotated[
    str, typer.Option(metavar="R,R,...", help="Ranks of the adapters, in turn: 16, or 8,256 for a mix.")
]
PeersOption = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME",
        help="Measured on the same load in the same run: transformers (with peft, on NF4 by bitsandbytes), "
        "transformers-plain (on plain weights), vllm, vllm-plain (where it is installed).",
        show_default=False,
    ),
]
PeerCasesOption = Annotated[
    str,
    typer.Option(
        metavar="B/A ...", help="Those of the cases that peers are measured on; all if left out.", show_default=False
    ),
]
OutOption = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the CSV and the PNG go.")]
SeedOption = Annotated[int, typer.Option(help="Of prompts and adapters.")]

DEFAULT_OUT = Path("bench-results")


def base_choice(
    shape: Shape,
    quantization: Quantization,
    dtype: Dtype,
    device: Device,
    checkpoint: bool,
    model: Path | None = None,
) -> BaseChoice:
    """The options of the panel "Base" as a value."""
    import torch

    from loraplex_server.bench.rig import BaseChoice

    if device is Device.CUDA and not torch.cuda.is_available():
        fail("this machine has no GPU that torch can use; leave --device out to measure its CPU", EXIT_USAGE)
    if model is not None and not (model / "config.json").is_file():
        fail(f"{model} is no model: it has no config.json", EXIT_USAGE)
    where = device.value if device is not Device.AUTO else "cuda" if torch.cuda.is_available() else "cpu"
    chosen_dtype = None if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    base = shape.value if model is None else str(model)
    return BaseChoice(base, torch.device(where), quantization.value, chosen_dtype, checkpoint)


def parsed(text: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    """A list with commas or blanks between. What is wrong with it ends the command."""
    words = text.replace(",", " ").split()
    try:
        found = tuple(parse(word) for word in words)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)
    if not found:
        fail("an empty list was given where something must be measured", EXIT_USAGE)
    return found


def chosen(text: str, known: Iterable[str], option: str) -> list[str]:
    """Names out of ``known``."""
    names = text.replace(",", " ").split()
    if unknown := [name for name in names if name not in known]:
        fail(f"{option} does not know {unknown[0]!r}; it knows {', '.join(known)}", EXIT_USAGE)
    return names


def peer_names(text: str) -> list[str]:
    """The value of --peers."""
    from loraplex_server.bench.peers import PEERS

    return chosen(text, PEERS, "--peers")


def guarded(run: Callable[[], object]) -> None:
    """Run a measurement; what cannot be done ends the command with one line."""
    from loraplex_server.bench.own_server import ServerNotStarted
    from loraplex_server.bench.rig import CaseFailed
    from loraplex_server.bench.serve import NoSuchServer
    from loraplex_server.model.errors import ModelError

    try:
        run()
    except (CaseFailed, ModelError, NoSuchServer, ServerNotStarted) as error:
        fail(str(error), EXIT_REFUSED)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)


def positive(word: str) -> int:
    """A whole number above zero, out of a list. Raises ValueError."""
    if not word.isdigit() or int(word) < 1:
        raise ValueError(f"{word!r} is not a positive whole number")
    return int(word)
