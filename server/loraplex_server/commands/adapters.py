"""`loraplex adapters`: what an operator does with adapters, from a shell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .combine import combine
from .connection import DEFAULT_BASE_URL, EXIT_REFUSED, AdminKey, BaseUrl, connected, fail
from .rendering import local_time, print_json, print_table, short_digest, size

if TYPE_CHECKING:
    from pydantic import BaseModel

    from loraplex_client import Adapter, AdapterVersion

adapters_app = typer.Typer(
    no_args_is_help=True,
    help="List, upload and change the adapters of a running server; combine folders offline. Exit codes: 0 done, 1 the server refused or is out "
    "of reach, 2 the command is wrong.",
)

adapters_app.command()(combine)

Name = Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON, for scripts.")]
Replace = Annotated[bool, typer.Option("--replace", help="Publish a new version if the name is taken.")]
Pinned = Annotated[bool, typer.Option("--pin", help="Keep it on the GPU from now on.")]


@adapters_app.command("list")
def list_adapters(as_json: AsJson = False, base_url: BaseUrl = DEFAULT_BASE_URL, admin_key: AdminKey = None) -> None:
    """Show all adapters: where each one is, and how many requests use it.

    Example: loraplex adapters list
    """
    with connected(base_url, admin_key=admin_key) as client:
        adapters = client.adapters.list()
    if as_json:
        return print_json(adapters)
    if not adapters:
        return typer.echo("No adapters yet. Add one with: loraplex adapters upload ./my-adapter")
    return print_table(
        ["name", "version", "rank", "size", "where", "pinned", "running", "waiting", "digest"],
        [
            [
                adapter.name,
                str(adapter.version or ""),
                str(adapter.rank),
                size(adapter.num_bytes),
                adapter.residency,
                "yes" if adapter.pinned else "",
                str(adapter.requests_running),
                str(adapter.requests_waiting),
                short_digest(adapter.digest),
            ]
            for adapter in adapters
        ],
    )


@adapters_app.command()
def show(name: Name, as_json: AsJson = False, base_url: BaseUrl = DEFAULT_BASE_URL, admin_key: AdminKey = None) -> None:
    """Show one adapter in full.

    Example: loraplex adapters show pirate
    """
    with connected(base_url, admin_key=admin_key) as client:
        adapter = client.adapters.show(name)
    _print_adapter(adapter, as_json)


@adapters_app.command()
def upload(
    path: Annotated[Path, typer.Argument(help="A PEFT folder, or a .zip, .tar or .tar.gz of one.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Its name on the server; the folder's if left out.")] = None,
    replace: Replace = False,
    pinned: Pinned = False,
    as_json: AsJson = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    admin_key: AdminKey = None,
) -> None:
    """Send an adapter from this machine; it can be used as soon as this returns.

    Example: loraplex adapters upload ./out/checkpoint-500 --name pirate
    """
    with connected(base_url, admin_key=admin_key) as client:
        adapter = client.adapters.upload(path, name=name, replace=replace, pinned=pinned)
    _report(adapter, f"{adapter.name} is published as version {adapter.version} ({size(adapter.num_bytes)}).", as_json)


@adapters_app.command()
def load(
    source: Annotated[
        str, typer.Argument(help="A path on the server, or hf://owner/repo[@revision].", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="Its name on the server.", show_default=False)],
    replace: Replace = False,
    pinned: Pinned = False,
    as_json: AsJson = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    admin_key: AdminKey = None,
) -> None:
    """Have the server fetch an adapter itself.

    Example: loraplex adapters load hf://someone/pirate-lora --name pirate
    """
    with connected(base_url, admin_key=admin_key) as client:
        adapter = client.adapters.load(source, name=name, replace=replace, pinned=pinned)
    _report(adapter, f"{adapter.name} is published as version {adapter.version} ({size(adapter.num_bytes)}).", as_json)


@adapters_app.command()
def delete(
    name: Name, as_json: AsJson = False, base_url: BaseUrl = DEFAULT_BASE_URL, admin_key: AdminKey = None
) -> None:
    """Retire an adapter; waits for the requests that use it.

    Example: loraplex adapters delete pirate
    """
    with connected(base_url, admin_key=admin_key) as client:
        deleted = client.adapters.delete(name)
    _report(deleted, f"{deleted.name} is deleted, {size(deleted.freed_bytes)} freed.", as_json)


@adapters_app.command()
def pin(name: Name, as_json: AsJson = False, base_url: BaseUrl = DEFAULT_BASE_URL, admin_key: AdminKey = None) -> None:
    """Keep an adapter on the GPU, so that its first request waits for no load.

    Example: loraplex adapters pin pirate
    """
    with connected(base_url, admin_key=admin_key) as client:
        adapter = client.adapters.pin(name)
    _report(adapter, f"{adapter.name} is pinned.", as_json)


@adapters_app.command()
def unpin(
    name: Name, as_json: AsJson = False, base_url: BaseUrl = DEFAULT_BASE_URL, admin_key: AdminKey = None
) -> None:
    """Let an adapter leave the GPU when others need the room.

    Example: loraplex adapters unpin pirate
    """
    with connected(base_url, admin_key=admin_key) as client:
        adapter = client.adapters.unpin(name)
    _report(adapter, f"{adapter.name} is not pinned any more.", as_json)


@adapters_app.command()
def versions(
    name: Name, as_json: AsJson = False, base_url: BaseUrl = DEFAULT_BASE_URL, admin_key: AdminKey = None
) -> None:
    """Show what was published under a name, and which version answers now.

    Example: loraplex adapters versions pirate
    """
    with connected(base_url, admin_key=admin_key) as client:
        found = client.adapters.versions(name)
    if as_json:
        return print_json(found)
    return print_table(
        ["version", "current", "published", "source", "digest"],
        [
            [
                str(version.version),
                "yes" if version.current else "",
                local_time(version.created_at),
                version.source or "",
                short_digest(version.digest),
            ]
            for version in found
        ],
    )


@adapters_app.command()
def rollback(
    name: Name,
    to: Annotated[
        str | None, typer.Option("--to", help="A version; the one before the current one if left out.")
    ] = None,
    as_json: AsJson = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    admin_key: AdminKey = None,
) -> None:
    """Make an earlier version answer again. Running requests keep the version they began with.

    Example: loraplex adapters rollback pirate --to 1
    """
    with connected(base_url, admin_key=admin_key) as client:
        version = _find_version(name, client.adapters.versions(name), to)
        adapter = client.adapters.update(name, version=version)
    _report(
        adapter, f"{adapter.name} answers with version {adapter.version} ({short_digest(adapter.digest)}).", as_json
    )


def _find_version(name: str, versions: list[AdapterVersion], wanted: str | None) -> int | str:
    """The wanted version, or the one before the current one; ends the command if there is none."""
    known = [version.version for version in versions]
    if wanted is not None:
        for version in known:
            if str(version) == wanted:
                return version
        fail(f"{name} has no version {wanted}; it has {', '.join(map(str, known))}", EXIT_REFUSED)
    current = next((index for index, version in enumerate(versions) if version.current), 0)
    if current == 0:
        fail(f"{name} has no version before the current one", EXIT_REFUSED)
    return known[current - 1]


def _report(answer: BaseModel, sentence: str, as_json: bool) -> None:
    if as_json:
        return print_json(answer)
    return typer.echo(sentence)


def _print_adapter(adapter: Adapter, as_json: bool) -> None:
    if as_json:
        return print_json(adapter)
    ranks = adapter.ranks
    same_rank = ranks is None or ranks.min == ranks.max
    return print_table(
        None,
        [
            ["name", adapter.name],
            ["aliases", ", ".join(adapter.aliases)],
            ["digest", adapter.digest],
            ["version", f"{adapter.version} of {len(adapter.versions)}"],
            ["base", adapter.base or ""],
            ["rank", str(adapter.rank) if same_rank or ranks is None else f"{ranks.min} to {ranks.max}"],
            ["target modules", ", ".join(adapter.target_modules)],
            ["parameters", f"{adapter.num_parameters:,}"],
            ["size", size(adapter.num_bytes)],
            ["where", f"{adapter.residency}, pinned" if adapter.pinned else adapter.residency],
            ["default mode", adapter.default_mode or ""],
            ["requests", f"{adapter.requests_running} running, {adapter.requests_waiting} waiting"],
            ["source", adapter.source or ""],
            ["created", local_time(adapter.created_at)],
            ["updated", local_time(adapter.updated_at)],
        ],
    )
