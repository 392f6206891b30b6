"""What the engine remembers of earlier prompts, forgotten on request: so that a measurement starts from nothing."""

from fastapi import APIRouter
from starlette.responses import PlainTextResponse

from loraplex_server.auth import Access, access
from loraplex_server.services import Uses

router = APIRouter(tags=["health"])


@router.post("/flush_cache", response_class=PlainTextResponse)
@access(Access.ADMIN)
async def flush_cache(services: Uses) -> PlainTextResponse:
    """Forget all cached prefixes; running requests go on. SGLang's call, which its benchmark makes.

    For admins: whoever empties the cache again and again slows everybody's prompts down.
    """
    await services.worker.forget_prefixes()
    return PlainTextResponse("Cache flushed.\n")
