"""`loraplex bench serve`: a load generator for any OpenAI-compatible server, or for one of ours started for the run."""

from __future__ import annotations

import re
import shlex
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from loraplex_server.commands.bench_options import (
    DEFAULT_OUT,
    CheckpointOption,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    OutOption,
    PeersOption,
    Quantization,
    QuantizationOption,
    RanksOption,
    SeedOption,
    Shape,
    ShapeOption,
    base_choice,
    guarded,
    parsed,
    peer_names,
    positive,
)
from loraplex_server.commands.connection import EXIT_USAGE, fail
from loraplex_server.commands.extras import require_server

if TYPE_CHECKING:
    from loraplex_client.load import LoadPlan, Slo
    from loraplex_server.bench.serve import Level

_SERVER, _LOAD = "Server", "Load"
_WARMUP_AT_A_RATE = 16


class Endpoint(StrEnum):
    CHAT = "chat"
    COMPLETIONS = "completions"


def serve(
    url: Annotated[
        str | None,
        typer.Option(
            help="A running server, of any make; a server of our own is started if left out.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LORAPLEX_API_KEY", help="Its key.", show_default=False, rich_help_panel=_SERVER),
    ] = None,
    models: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="With --url: what requests name; all that the server lists if left out.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = "",
    label: Annotated[
        str,
        typer.Option(
            help="With --url: what tables and files call the server; its address if left out.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = "",
    adapters: Annotated[
        int, typer.Option(min=0, help="Of our own server, random; 0 asks the base.", rich_help_panel=_SERVER)
    ] = 8,
    serve_flags: Annotated[
        str,
        typer.Option(
            help="More flags of `loraplex serve` for our own server.", show_default=False, rich_help_panel=_SERVER
        ),
    ] = "",
    concurrency: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Closed loop: so many streams, each sending its next request when the last has ended.",
            rich_help_panel=_LOAD,
        ),
    ] = "1,8,32",
    rate: Annotated[
        str,
        typer.Option(
            metavar="R,R,...",
            help="Open loop instead: requests a second, whatever the server does; latencies count from when each was due.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = "",
    burstiness: Annotated[
        float,
        typer.Option(
            help="Shape of the gamma process of --rate: 1 is Poisson, less is burstier.", rich_help_panel=_LOAD
        ),
    ] = 1.0,
    num_requests: Annotated[
        str | None,
        typer.Option(
            metavar="N|Nx",
            help="Requests of each level; 2x: two for each stream.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time of each level; 30 if --num-requests is left out too.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="128, uniform:64:256, or lognormal:128:0.6 (median, sigma).", rich_help_panel=_LOAD)
    ] = "128",
    output_tokens: Annotated[str, typer.Option(help="Likewise, of the answers.", rich_help_panel=_LOAD)] = "128",
    mix: Annotated[
        str,
        typer.Option(
            help="Which model a request names: distinct (one after the other), uniform, zipf:1.1, one.",
            rich_help_panel=_LOAD,
        ),
    ] = "distinct",
    endpoint: Annotated[Endpoint, typer.Option(help="What is called.", rich_help_panel=_LOAD)] = Endpoint.CHAT,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for full-length answers; not every server knows the field.", rich_help_panel=_LOAD)
    ] = True,
    temperature: Annotated[float, typer.Option(min=0, max=2, rich_help_panel=_LOAD, help="0 is greedy.")] = 0.0,
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Requests before each level; two a stream, or 16, if left out.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Of the load generator, so that it is not the limit.", rich_help_panel=_LOAD)
    ] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.", rich_help_panel=_LOAD)] = 600.0,
    slo: Annotated[
        str,
        typer.Option(
            metavar="first=MS,token=MS,request=MS",
            help="What a good request keeps to; goodput counts those.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = "",
    shape: ShapeOption = Shape.TINY,
    ranks: RanksOption = "16",
    model: ModelOption = None,
    quantization: QuantizationOption = Quantization.NF4,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = Device.AUTO,
    checkpoint: CheckpointOption = False,
    peers: PeersOption = "",
    seed: SeedOption = 0,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Load a server over HTTP with streams: time to first token, between tokens, whole requests, tokens a second.

    Examples:

    loraplex bench serve --url http://127.0.0.1:8000 --concurrency 1,8,32 --duration 20

    loraplex bench serve --url https://my-server --api-key "$KEY" --models base,sql --rate 5,10 --mix zipf:1.1 --slo first=300,token=30

    loraplex bench serve --shape llama-8b --adapters 8 --concurrency 32 --prompt-tokens lognormal:256:0.5
    """
    require_server()
    from loraplex_client.load import Lengths, LoadPlan, Mix
    from loraplex_server.bench.serve import ServePlan, run_against, run_own

    levels = _levels(concurrency, rate, num_requests, warmup)
    longest = max(level.concurrency or 16 for level in levels)

    def plan(load_url: str) -> LoadPlan:
        return LoadPlan(
            url=load_url,
            models=("?",),
            concurrency=levels[0].concurrency,
            rate=levels[0].rate,
            burstiness=burstiness,
            num_requests=levels[0].num_requests,
            duration_s=duration if duration or num_requests else 30.0,
            prompt_tokens=Lengths(prompt_tokens),
            output_tokens=Lengths(output_tokens),
            mix=Mix(mix),
            endpoint=endpoint.value,
            api_key=api_key,
            ignore_eos=ignore_eos,
            temperature=temperature,
            timeout_s=timeout,
            processes=processes,
            seed=seed,
        )

    def run() -> None:
        if url is not None:
            if peers:
                fail("--peers are measured beside a server of our own; leave --url out", EXIT_USAGE)
            name = f"serve_{re.sub(r'[^a-zA-Z0-9.-]+', '-', label)}" if label else "serve"
            run_against(
                ServePlan(plan(url), levels, _slo(slo), name, label or url), models.replace(",", " ").split(), out
            )
            return
        from loraplex_server.bench.cases import spread_ranks

        choice = base_choice(shape, quantization, dtype, device, checkpoint, model)
        serving = ServePlan(plan("http://own"), levels, _slo(slo), f"serve_{choice.name}", "loraplex")
        flags = ["--max-running", str(max(longest, 16)), *shlex.split(serve_flags)]
        run_own(serving, choice, spread_ranks(parsed(ranks, positive), adapters), flags, peer_names(peers), out)

    guarded(run)


def _levels(concurrency: str, rate: str, num_requests: str | None, warmup: int | None) -> tuple[Level, ...]:
    from loraplex_server.bench.serve import Level

    def level(streams: int | None, per_second: float | None) -> Level:
        default = _WARMUP_AT_A_RATE if streams is None else 2 * streams
        requests = None if num_requests is None else _num_requests(num_requests, streams)
        return Level(streams, per_second, requests, default if warmup is None else warmup)

    if rate:
        return tuple(level(None, each) for each in parsed(rate, float))
    return tuple(level(each, None) for each in parsed(concurrency, positive))


def _num_requests(text: str, streams: int | None) -> int:
    """``20``, or ``2x`` for two for each stream."""
    number, each = text.removesuffix("x"), text.endswith("x")
    if each and streams is None:
        fail(f"--num-requests {text} counts streams, and --rate has none", EXIT_USAGE)
    (count,) = parsed(number, positive)
    return count * (streams or 1) if each else count


def _slo(text: str) -> Slo:
    from loraplex_client.load import Slo

    names = {"first": "first_token_ms", "token": "per_token_ms", "request": "request_ms"}
    limits: dict[str, float] = {}
    for part in text.replace(",", " ").split():
        name, _, value = part.partition("=")
        if name not in names:
            raise ValueError(
                f"--slo does not know {part!r}; write first=300,token=30,request=5000, all in milliseconds"
            )
        limits[names[name]] = float(value)
    return Slo(**limits)
