"""How every client command reaches the server, and how it says that it could not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from loraplex_client import Loraplex, LoraplexError

EXIT_REFUSED = 1
"""The server refused, or could not be reached."""
EXIT_USAGE = 2
"""The command itself is wrong: a missing file, an empty prompt. Typer's own code for wrong options."""

BaseUrl = Annotated[
    str,
    typer.Option("--base-url", envvar="LORAPLEX_BASE_URL", help="The server's address.", rich_help_panel="Connection"),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="LORAPLEX_API_KEY",
        help="The user key, if the server has one.",
        show_default=False,
        rich_help_panel="Connection",
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        "--admin-key",
        envvar="LORAPLEX_ADMIN_KEY",
        help="The admin key, if the server has one.",
        show_default=False,
        rich_help_panel="Connection",
    ),
]
DEFAULT_BASE_URL = "http://127.0.0.1:8000"


@contextmanager
def connected(base_url: str, *, api_key: str | None = None, admin_key: str | None = None) -> Iterator[Loraplex]:
    """A client for one command. What goes wrong with it ends the command: one line on stderr and an exit code."""
    from loraplex_client import LocalAdapterError, Loraplex, LoraplexError

    # One retry: a person waits for this, and may press the up arrow.
    with Loraplex(base_url, api_key=api_key, admin_key=admin_key, max_retries=1) as client:
        try:
            yield client
        except LoraplexError as error:
            fail(explain(error), EXIT_USAGE if isinstance(error, LocalAdapterError) else EXIT_REFUSED)


def explain(error: LoraplexError) -> str:
    """The error in one line, with the way out where there is one."""
    import httpx

    from loraplex_client import APIError, AuthenticationError, RateLimitError

    if isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
        return f"no server answers at {error}. Start one with `loraplex serve`, or say where it is with --base-url."
    if isinstance(error, AuthenticationError):
        return f"{error.message.rstrip('.')}. Give --api-key or --admin-key, or set LORAPLEX_API_KEY or LORAPLEX_ADMIN_KEY."
    if isinstance(error, RateLimitError):
        return f"the server is busy, try again in a moment: {error.message}"
    if isinstance(error, APIError):
        return error.message
    return str(error)


def fail(message: str, exit_code: int) -> NoReturn:
    """Say what is wrong on stderr and end the command."""
    complain(message)
    raise typer.Exit(exit_code)


def complain(message: str) -> None:
    """Say what is wrong on stderr."""
    typer.secho(f"error: {message}", fg="red", err=True)
