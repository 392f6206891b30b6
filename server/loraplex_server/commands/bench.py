"""`loraplex bench`: measure this version on this machine, beside peers, into CSV files and plots."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex_server.commands.bench_adapters import adapters
from loraplex_server.commands.bench_options import (
    DEFAULT_OUT,
    CheckpointOption,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    OutOption,
    PeerCasesOption,
    PeersOption,
    Quantization,
    QuantizationOption,
    RanksOption,
    SeedOption,
    Shape,
    ShapeOption,
    base_choice,
    chosen,
    guarded,
    parsed,
    peer_names,
    positive,
)
from loraplex_server.commands.bench_serve import serve
from loraplex_server.commands.extras import require_server

bench_app = typer.Typer(
    no_args_is_help=True,
    help="""Measure decode steps, prompts, adapter loads or a served load; beside peers, as CSV and PNG.

Weights are random in a real model's shape (--shape), made on the device in seconds: speed does not depend on their
values, and no download is needed. Examples:

    loraplex bench decode --shape llama-8b --cases "1/0 1/1 8/8 32/8" --peers transformers

    loraplex bench prefill --shape llama-8b --cases "32/0 32/8" --lengths 1024

    loraplex bench serve --url http://127.0.0.1:8000 --concurrency 1,8,32
""",
)


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
    peer_cases: PeerCasesOption = "",
    model: ModelOption = None,
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
        ranks=parsed(ranks, positive),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
        peer_cases=parsed(peer_cases, Case.parse) if peer_cases else (),
    )
    choice = base_choice(shape, quantization, dtype, device, checkpoint, model)
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
    max_batched_tokens: Annotated[int, typer.Option(min=16, help="Tokens of one step, as of `loraplex serve`.")] = 8192,
    peers: PeersOption = "",
    peer_cases: PeerCasesOption = "",
    model: ModelOption = None,
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
        lengths=parsed(lengths, positive),
        ranks=parsed(ranks, positive),
        repeats=repeats,
        max_batched_tokens=max_batched_tokens,
        seed=seed,
        peer_cases=parsed(peer_cases, Case.parse) if peer_cases else (),
    )
    choice = base_choice(shape, quantization, dtype, device, checkpoint, model)
    guarded(lambda: run_prefill(choice, plan, peer_names(peers), out))


bench_app.command()(serve)
bench_app.command()(adapters)
