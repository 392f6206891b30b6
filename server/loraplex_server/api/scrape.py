"""What Prometheus reads."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from loraplex_server.auth import Access, access
from loraplex_server.metrics import CONTENT_TYPE, Metrics


def scrape_router(metrics: Metrics, level: Access) -> APIRouter:
    """``GET /metrics`` for those who may make calls of this level."""
    router = APIRouter(tags=["health"])

    @router.get("/metrics", response_class=Response)
    @access(level)
    async def scrape() -> Response:
        """Everything that is measured, in Prometheus' text format."""
        text = await asyncio.to_thread(metrics.snapshot().text)
        return Response(text, media_type=CONTENT_TYPE)

    return router
