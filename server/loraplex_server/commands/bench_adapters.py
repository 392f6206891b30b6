"""`loraplex bench adapters`: loads, what they cost others, and thousands of adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex_server.commands.bench_options import (
    DEFAULT_OUT,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    OutOption,
    Quantization,
    QuantizationOption,
    RanksOption,
    SeedOption,
    Shape,
    ShapeOption,
    base_choice,
    guarded,
    parsed,
    positive,
)
from loraplex_server.commands.extras import require_server

_LOADS, _STREAMS, _RATE, _MEMORY = "Loads", "Beside streams", "Rate of requests", "Memory"


def adapters(
    shape: ShapeOption = Shape.LLAMA_8B,
    ranks: RanksOption = "8,16,64",
    loads: Annotated[
        int, typer.Option(min=1, help="Adapters of each rank that are timed.", rich_help_panel=_LOADS)
    ] = 20,
    streams: Annotated[
        int, typer.Option(min=1, help="Sequences that decode while adapters come in.", rich_help_panel=_STREAMS)
    ] = 8,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long they are watched each time.", rich_help_panel=_STREAMS)
    ] = 4.0,
    load_every: Annotated[
        float, typer.Option(min=0.001, help="Seconds from one load to the next.", rich_help_panel=_STREAMS)
    ] = 0.1,
    registered: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Adapters that requests are spread over.", rich_help_panel=_RATE),
    ] = "5,100,1000,2000",
    rate_rank: Annotated[int, typer.Option(min=1, help="Rank of those.", rich_help_panel=_RATE)] = 8,
    zipf: Annotated[
        float, typer.Option(min=0.0, help="Exponent of Zipf's law; 0 spreads requests evenly.", rich_help_panel=_RATE)
    ] = 1.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=_RATE)] = 32,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests that count, for each number of adapters.", rich_help_panel=_RATE)
    ] = 400,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each of them, on average.", rich_help_panel=_RATE)] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of every request.")] = 128,
    device_adapters: Annotated[
        int,
        typer.Option(min=1, help="Adapters of the largest rank that have room on the device.", rich_help_panel=_MEMORY),
    ] = 32,
    host_adapters: Annotated[int, typer.Option(min=1, help="And in host memory.", rich_help_panel=_MEMORY)] = 128,
    files: Annotated[
        int, typer.Option(min=1, help="Files of each rank that are written to disk.", rich_help_panel=_MEMORY)
    ] = 16,
    quantization: QuantizationOption = Quantization.NF4,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = Device.AUTO,
    seed: SeedOption = 0,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """How long adapters take to load, what that costs others, and how requests fare with thousands of adapters.

    First, from disk and from host memory: copies alone, and the way to the first token. Then the time between two tokens
    of steady streams, with a new adapter every --load-every seconds and without. Last, requests a second with few and
    with many adapters.

    Examples:

    loraplex bench adapters --shape llama-8b --ranks 8,16,64

    loraplex bench adapters --shape qwen2.5-1.5b --registered 5,2000 --concurrency 64 --device-adapters 64
    """
    require_server()
    from loraplex_server.bench.adapters import AdaptersPlan
    from loraplex_server.bench.runs import run_adapters

    plan = AdaptersPlan(
        ranks=parsed(ranks, positive),
        num_loads=loads,
        num_streams=streams,
        stream_s=seconds,
        load_every_s=load_every,
        registered=parsed(registered, positive),
        rate_rank=rate_rank,
        concurrency=concurrency,
        num_requests=requests,
        zipf=zipf,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device_adapters=device_adapters,
        host_adapters=host_adapters,
        num_files=files,
        seed=seed,
    )
    choice = base_choice(shape, quantization, dtype, device, checkpoint=False)
    guarded(lambda: run_adapters(choice, plan, out))
