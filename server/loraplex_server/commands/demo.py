"""`loraplex demo`: a server with the embedded model, one prompt for the base and every adapter, one upload, an end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraplex_server.commands.extras import require_server

if TYPE_CHECKING:
    from rich.console import Console

    from loraplex_client import AsyncLoraplex

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Reply:
    """What one model said, and after how long (milliseconds to the first token, and in all)."""

    model: str
    text: str
    first_token_ms: float
    total_ms: float


def demo(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; the demo has a question of its own.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running until Ctrl-C.")] = False,
    port: Annotated[
        int | None,
        typer.Option(help="Where to listen on 127.0.0.1.", show_default="8000 with --keep, else a free port"),
    ] = None,
) -> None:
    """Serve a tiny embedded model with three adapters on this machine, and show what Loraplex does.

    The same prompt goes to the base and to each adapter in one batch; a fourth adapter is uploaded over HTTP, used and
    unloaded; the metrics show all of it. Needs no GPU and no network. Example:

        loraplex demo "What is the capital of Italy?"
    """
    require_server()
    from rich.console import Console

    console = Console()
    port = port or (8000 if keep else _free_port())
    with tempfile.TemporaryDirectory(prefix="loraplex-demo-") as scratch, _server(port, Path(scratch)) as url:
        failed = asyncio.run(_show(console, url, prompt))
        if failed:
            raise typer.Exit(1)
        if keep:
            _wait(console, url)


@contextmanager
def _server(port: int, scratch: Path) -> Iterator[str]:
    """A server process of its own, as a user would start it; its log is shown if it does not come up."""
    from loraplex_server.demo import DEMO_ADAPTERS, DEMO_BASE_NAME, DEMO_MODEL

    served = list(DEMO_ADAPTERS.items())[:-1]
    command = [sys.executable, "-m", "loraplex_server.cli", "serve", "--model", str(DEMO_MODEL)]
    command += ["--served-model-name", DEMO_BASE_NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--data-dir", str(scratch / "data"), "--device", "cpu"]
    for name, path in served:
        command += ["--adapter", f"{name}={path}"]
    # The demo is about itself: settings meant for the user's own server stay out.
    env = {key: value for key, value in os.environ.items() if not key.startswith("LORAPLEX_")}
    log_path = scratch / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _await_ready(process, url, log_path)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_ready(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=2).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    typer.echo(log_path.read_text(errors="replace")[-4000:], err=True)
    typer.secho("error: the demo server did not start; its log is above.", fg="red", err=True)
    raise typer.Exit(1)


async def _show(console: Console, url: str, prompt: str | None) -> bool:
    """The whole show. True if something did not work."""
    from loraplex_client import AsyncLoraplex, LoraplexError, NotFoundError
    from loraplex_server.demo import DEMO_ADAPTERS, DEMO_BASE_NAME, PROMPTS

    question = prompt or PROMPTS[0]
    *served, (late_name, late_path) = DEMO_ADAPTERS.items()
    async with AsyncLoraplex(url) as client:
        try:
            console.print(
                f"[dim]Serving the embedded model at {url}, its linears in NF4, with {len(served)} adapters.[/]"
            )
            await asyncio.gather(*(_ask(client, name, "hello") for name, _ in served))
            models = [DEMO_BASE_NAME, *(name for name, _ in served)]
            replies = await asyncio.gather(*(_ask(client, model, question) for model in models))
            _print_replies(console, f"“{question}” to the base and every adapter, in one batch", replies)

            started = time.perf_counter()
            adapter = await client.adapters.upload(late_path, name=late_name)
            took_ms = (time.perf_counter() - started) * 1e3
            console.print(
                f"\nUploaded [bold]{late_name}[/] over HTTP in {took_ms:.0f} ms "
                f"[dim](rank {adapter.rank}, {adapter.num_bytes / 1e3:.0f} kB, digest {adapter.digest[:12]})[/]"
            )
            _print_replies(console, f"“{question}” to it, its first use", [await _ask(client, late_name, question)])
            metrics = await client.metrics()
            deleted = await client.adapters.delete(late_name)
            console.print(f"\nUnloaded [bold]{late_name}[/], {deleted.freed_bytes / 1e3:.0f} kB freed.")
            try:
                await _ask(client, late_name, question)
            except NotFoundError as error:
                console.print(f"Asked once more: [yellow]{error.status_code} {error.code}[/], as it should be.")
            else:
                console.print("[red]It still answers.[/]")
                return True
        except LoraplexError as error:
            console.print(f"[red]error: {error}[/]")
            return True
    return not _print_metrics(console, metrics)


async def _ask(client: AsyncLoraplex, model: str, question: str) -> Reply:
    started = time.perf_counter()
    first_token_s, parts = None, []
    stream = await client.chat(question, model=model, stream=True, temperature=0, max_tokens=64)
    async with stream:
        async for chunk in stream:
            if chunk.text and first_token_s is None:
                first_token_s = time.perf_counter() - started
            parts.append(chunk.text)
    total_s = time.perf_counter() - started
    return Reply(model, "".join(parts), (first_token_s or total_s) * 1e3, total_s * 1e3)


def _print_replies(console: Console, title: str, replies: list[Reply]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    table.add_column("model", style="bold")
    table.add_column("answer", overflow="fold")
    table.add_column("first token", justify="right")
    table.add_column("whole answer", justify="right")
    for reply in replies:
        times = (f"{reply.first_token_ms:.0f} ms", f"{reply.total_ms:.0f} ms")
        table.add_row(reply.model, Text(reply.text), *times)
    console.print(table)


def _print_metrics(console: Console, exposition: str) -> bool:
    """What the server counted, by adapter; False if it counted nothing."""
    from prometheus_client.parser import text_string_to_metric_families
    from rich.table import Table

    sums: dict[tuple[str, str, str], float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            key = (sample.labels.get("adapter", ""), sample.labels.get("mode", ""), sample.name)
            sums[key] = sums.get(key, 0.0) + sample.value
    table = Table(title="\nWhat Prometheus saw (GET /metrics), before the unload", title_justify="left")
    for column in ("adapter", "mode"):
        table.add_column(column, style="bold")
    for column in ("requests", "tokens out", "mean time to first token"):
        table.add_column(column, justify="right")
    counted = [(adapter, mode) for adapter, mode, name in sums if name == "loraplex_requests_total"]
    for adapter, mode in counted:
        count, total = (
            sums[adapter, mode, f"loraplex_time_to_first_token_seconds_{part}"] for part in ("count", "sum")
        )
        tokens = sums.get((adapter, mode, "loraplex_output_tokens_total"), 0)
        requests = sums[adapter, mode, "loraplex_requests_total"]
        table.add_row(adapter, mode, f"{requests:.0f}", f"{tokens:.0f}", f"{total / max(count, 1) * 1e3:.0f} ms")
    console.print(table)
    return bool(counted)


def _wait(console: Console, url: str) -> None:
    console.print(f"\nThe server keeps running at [bold]{url}[/] until Ctrl-C. Talk to it from another terminal:\n")
    console.print(f"  loraplex chat --base-url {url} --model pirate")
    console.print(f"  curl {url}/v1/models")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("Stopped.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
