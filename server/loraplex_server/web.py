"""How uvicorn serves the application: the fastest loop and parser that are installed, and bounds on what they read."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from starlette.types import ASGIApp

# Of a request's line and headers together.
MAX_HEAD_BYTES = 64 << 10


def web_config(app: "ASGIApp", host: str, port: int) -> uvicorn.Config:
    """The settings of a server for ``app``; without httptools it parses in Python, without uvloop it runs asyncio's loop."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="loraplex_server.http_head:BoundedHead" if find_spec("httptools") else "h11",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        # Longer than clients and proxies keep idle connections, or they would reuse one that is just being closed.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )
