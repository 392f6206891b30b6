"""The HTTP application: routes, and around them keys, limits, the log and the error table."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from loraplex_adapters.errors import AdapterError
from loraplex_server.api import adapters, chat, completions, health, models, prefix_cache, tokenize, vllm_adapters
from loraplex_server.api.adapter_changes import AdapterChanges
from loraplex_server.api.body_limit import BodyLimit
from loraplex_server.api.early_answer import EarlyAnswer
from loraplex_server.api.request_log import RequestLog, note_failure
from loraplex_server.api.scrape import scrape_router
from loraplex_server.auth import AccessControl
from loraplex_server.engine.worker import EngineCallFailed, EngineStopped, QueueFull
from loraplex_server.errors import ApiError, error_response
from loraplex_server.metrics import Metrics
from loraplex_server.services import Services
from loraplex_server.time_limit import TimeLimit

_ROUTERS = (
    chat.router,
    completions.router,
    models.router,
    tokenize.router,
    health.router,
    adapters.router,
    vllm_adapters.router,
    prefix_cache.router,
)

# All that endpoints raise on purpose. What else they raise is answered and logged by RequestLog.
_EXPECTED = (ApiError, AdapterError, QueueFull, EngineStopped, EngineCallFailed, RequestValidationError, HTTPException)


def create_app(services: Services) -> FastAPI:
    """The application over these services. It starts the worker when it starts, and drains it when it stops."""
    app = FastAPI(
        title="Loraplex",
        version=health.VERSION,
        description="One base model, many LoRA adapters, selected by `model`.",
        lifespan=_lifespan,
        # The routes of these are ours, so that they declare who may call them.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.template_time = TimeLimit(services.limits.template_timeout_s)
    app.state.adapter_changes = AdapterChanges()
    routers = [*_ROUTERS]
    if isinstance(services.metrics, Metrics) and services.metrics_access is not None:
        routers.append(scrape_router(services.metrics, services.metrics_access))
    for router in routers:
        # One flat table: the keys are checked on the very routes that answer.
        app.router.routes.extend(router.routes)
    for expected in _EXPECTED:
        app.add_exception_handler(expected, _answer)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=services.limits.max_body_bytes)
    app.add_middleware(AccessControl, keys=services.keys, routes=app.router.routes)
    app.add_middleware(RequestLog)
    app.add_middleware(EarlyAnswer)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.worker.start()
    try:
        yield
    finally:
        await services.worker.drain(services.limits.drain_timeout_s)
        await services.worker.stop()


async def _answer(request: Request, error: Exception) -> Response:
    note_failure(request.scope, error)
    return error_response(error)
