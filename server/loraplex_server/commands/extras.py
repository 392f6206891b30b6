"""What `serve` and `demo` need beyond the client's packages: the `server` extra, and what to say without it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from loraplex_server.commands.connection import EXIT_USAGE, fail

SERVER_PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "safetensors",
    "huggingface_hub",
    "fastapi",
    "uvicorn",
    "pydantic_settings",
    "prometheus_client",
    "python_multipart",
    "structlog",
)
"""The packages of the extra as they are imported; those that only tests and measurements use are left out."""


def missing_packages() -> list[str]:
    """The server's packages that are not installed; none of them is imported."""
    return [name for name in SERVER_PACKAGES if not _is_there(name)]


def require_server() -> None:
    """End the command unless the server's packages are there, saying how to get them."""
    if missing := missing_packages():
        fail(
            f"the server's packages are not installed ({', '.join(missing)}). Install Loraplex with its `server` extra; "
            "from a checkout: pip install '.[server]'",
            EXIT_USAGE,
        )


def serve_without_server(
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Serve a base model and its adapters. Not installed: needs the `server` extra, pip install '.\\[server]'."""
    require_server()


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
