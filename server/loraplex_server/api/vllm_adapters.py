"""vLLM's two adapter calls, with its answers in plain text, for tools that speak them."""

import asyncio
import re
from pathlib import Path

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import PlainTextResponse

from loraplex_adapters.errors import AdapterError, AdapterNameTaken, AdapterNotFound
from loraplex_server.api.adapter_changes import Changes, apply_pins
from loraplex_server.api.schemas import Body
from loraplex_server.auth import Access, access
from loraplex_server.errors import ApiError, to_api_error
from loraplex_server.services import Uses

router = APIRouter(tags=["adapters"])

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Callers of vLLM expect an answer at once; what still drains after this is freed by itself.
_DRAIN_TIMEOUT_S = 10.0


class LoadAdapter(Body):
    """``lora_path``: a path below an allowed root, ``hf://org/repo``, or a bare Hub id."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadAdapter(Body):
    """``lora_int_id`` is vLLM's own number for the same adapter; the name decides."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
@access(Access.ADMIN)
async def load_lora_adapter(body: LoadAdapter, services: Uses) -> PlainTextResponse:
    """Add an adapter that the server reads itself; with ``load_inplace`` also under a name that is taken."""
    name = body.lora_name
    try:
        if not body.load_inplace:
            _check_free(services, name)
        adapter, _, _ = await asyncio.to_thread(
            services.installer.install_source, name, _source_of(body.lora_path), replace=body.load_inplace
        )
    except AdapterError as error:
        raise _user_error(error) from error
    apply_pins(services, (version.digest for version in services.registry.versions(adapter.name)))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
@access(Access.ADMIN)
async def unload_lora_adapter(body: UnloadAdapter, services: Uses, changes: Changes) -> PlainTextResponse:
    """Retire an adapter; running requests finish on it."""
    name = body.lora_name
    try:
        if services.registry.resolve(name).name != name:
            raise AdapterNotFound(f"{name[:140]!r} is not an adapter's own name.")
        await changes.retire(services, name, _DRAIN_TIMEOUT_S)
    except AdapterNotFound:
        raise
    except AdapterError as error:
        raise _user_error(error) from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _check_free(services: Uses, name: str) -> None:
    try:
        services.registry.resolve(name)
    except AdapterNotFound:
        return
    raise AdapterNameTaken(f"The adapter {name[:140]!r} is loaded already. To replace it, send load_inplace=true.")


def _source_of(path: str) -> str:
    """vLLM takes a Hub id wherever no such path exists."""
    if _HUB_ID.fullmatch(path) and not Path(path).exists():
        return f"hf://{path}"
    return path


def _user_error(error: AdapterError) -> ApiError:
    """vLLM knows 400 for all that the caller can mend."""
    answer = to_api_error(error)
    status = 400 if answer.status < 500 else answer.status
    return ApiError(answer.message, status=status, code=answer.code, param=answer.param)
