"""Is the process up, can it serve, which version is it."""

from importlib.metadata import version

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, JSONResponse, Response

from loraplex_server.auth import Access, access
from loraplex_server.engine.worker import EngineStopped
from loraplex_server.errors import error_response
from loraplex_server.services import Uses

router = APIRouter(tags=["health"])

VERSION = version("loraplex")


@router.get("/health")
@access(Access.OPEN)
async def health() -> dict[str, str]:
    """The process is up."""
    return {"status": "ok"}


@router.get("/ready", response_model=None)
@access(Access.OPEN)
async def ready(services: Uses) -> Response:
    """Requests are taken now; 503 while the server starts or drains, and when its engine has stopped."""
    if not services.worker.running:
        return error_response(EngineStopped())
    return JSONResponse({"status": "ready"})


@router.get("/version")
@access(Access.USER)
async def show_version() -> dict[str, str]:
    """The server's version."""
    return {"version": VERSION}


@router.get("/openapi.json", include_in_schema=False)
@access(Access.USER)
async def openapi(request: Request) -> JSONResponse:
    """The API's schema."""
    return JSONResponse(request.app.openapi())


@router.get("/docs", include_in_schema=False)
@access(Access.USER)
async def docs() -> HTMLResponse:
    """The API's schema, to read and try."""
    return get_swagger_ui_html(openapi_url="openapi.json", title="Loraplex")
