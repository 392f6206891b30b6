"""`loraplex bench`: measure this version on this machine, beside peers, into CSV files and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from loraplex_server.commands.connection import EXIT_REFUSED, EXIT_USAGE, fail
from loraplex_server.commands.extras import require_server

if TYPE_CHECKING:
    from loraplex_server.bench.rig import BaseChoice

T = TypeVar("T")

bench_app = typer.Typer(
    no_args_is_help=True,
    help="""Measure decode steps, prompts, adapter loads or a served load; beside peers, as CSV and PNG.

Weights are random in a real model's shape (--shape), made on the device in seconds: speed does not depend on their
values, and no download is needed. Examples:

    loraplex bench decode --shape llama-8b --cases "1/0 1/1 8/8 32/8" --peers transformers

    loraplex bench prefill --shape llama-8b --cases "32/0 32/8" --lengths 1024

    loraplex bench serve --url http://127.0.0.1:8000 --model my-base --concurrency 32
""",
)


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
OutOption = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the CSV and the PNG go.")]
SeedOption = Annotated[int, typer.Option(help="Of prompts and adapters.")]

DEFAULT_OUT = Path("bench-results")


@bench_app.command()
def decode(
    shape: ShapeOption = Shape.LLAMA_8B,
    cases: Annotated[
        str,
        typer.Option(
            metavar="B/A ...", help="Sequences at once / distinct adapters among them; 8/0 is the base alone."
        ),
    ] = "1/0 1/1 8/0 8/8 32/0 32/8",
    modes: Annotated[
        str,
        typer.Option(metavar="MODE,MODE", help="greedy, sampled (top-k and top-p), logprobs (greedy, five a token)."),
    ] = "greedy",
    ranks: RanksOption = "16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=8, help="Decode steps of each case.")] = 64,
    peers: PeersOption = "",
    quantization: QuantizationOption = Quantization.NF4,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = Device.AUTO,
    checkpoint: CheckpointOption = False,
    seed: SeedOption = 0,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Milliseconds of one decode step, through the real engine: scheduler, sampling, tokens on the host.

    Beside each figure stands the floor: the bytes that the step must read over the rate at which this device copies.

    Examples:

    loraplex bench decode --shape llama-8b --cases "1/0 1/1 8/8 32/8 64/8"

    loraplex bench decode --shape qwen2.5-7b --cases "8/8" --ranks 8,256 --modes greedy,sampled,logprobs

    loraplex bench decode --shape qwen2.5-0.5b --device cpu --cases "1/1 8/4" --peers transformers
    """
    require_server()
    from loraplex_server.bench.cases import MODES, Case
    from loraplex_server.bench.decode import DecodePlan
    from loraplex_server.bench.runs import run_decode

    plan = DecodePlan(
        cases=parsed(cases, Case.parse),
        modes=tuple(mode for mode in MODES if mode in chosen(modes, MODES, "--modes")),
        ranks=parsed(ranks, _rank),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
    )
    choice = base_choice(shape, quantization, dtype, device, checkpoint)
    guarded(lambda: run_decode(choice, plan, peer_names(peers), out))


@bench_app.command()
def prefill(
    shape: ShapeOption = Shape.LLAMA_8B,
    cases: Annotated[
        str, typer.Option(metavar="N/A ...", help="Prompts submitted at once / distinct adapters among them.")
    ] = "32/0 32/8",
    lengths: Annotated[str, typer.Option(metavar="L,L,...", help="Tokens of each prompt.")] = "1024",
    ranks: RanksOption = "16",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each case, after one that does not count.")] = 3,
    max_batched_tokens: Annotated[int, typer.Option(min=16, help="Tokens of one step, as of `loraplex serve`.")] = 2048,
    peers: PeersOption = "",
    quantization: QuantizationOption = Quantization.NF4,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = Device.AUTO,
    checkpoint: CheckpointOption = False,
    seed: SeedOption = 0,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Prompt tokens a second, and milliseconds to the first token, when many prompts come at once.

    Examples:

    loraplex bench prefill --shape llama-8b --cases "32/0 32/8" --lengths 1024

    loraplex bench prefill --shape qwen2.5-1.5b --cases "1/0 1/1" --lengths 128,1024,8000
    """
    require_server()
    from loraplex_server.bench.cases import Case
    from loraplex_server.bench.prefill import PrefillPlan
    from loraplex_server.bench.runs import run_prefill

    plan = PrefillPlan(
        cases=parsed(cases, Case.parse),
        lengths=parsed(lengths, _positive),
        ranks=parsed(ranks, _rank),
        repeats=repeats,
        max_batched_tokens=max_batched_tokens,
        seed=seed,
    )
    choice = base_choice(shape, quantization, dtype, device, checkpoint)
    guarded(lambda: run_prefill(choice, plan, peer_names(peers), out))


def base_choice(shape: Shape, quantization: Quantization, dtype: Dtype, device: Device, checkpoint: bool) -> BaseChoice:
    """The options of the panel "Base" as a value."""
    import torch

    from loraplex_server.bench.rig import BaseChoice

    if device is Device.CUDA and not torch.cuda.is_available():
        fail("this machine has no GPU that torch can use; leave --device out to measure its CPU", EXIT_USAGE)
    where = device.value if device is not Device.AUTO else "cuda" if torch.cuda.is_available() else "cpu"
    chosen_dtype = None if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    return BaseChoice(shape.value, torch.device(where), quantization.value, chosen_dtype, checkpoint)


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
    from loraplex_server.bench.rig import CaseFailed
    from loraplex_server.model.errors import ModelError

    try:
        run()
    except (CaseFailed, ModelError) as error:
        fail(str(error), EXIT_REFUSED)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise ValueError(f"{word!r} is not a positive whole number")
    return int(word)


def _rank(word: str) -> int:
    return _positive(word)
