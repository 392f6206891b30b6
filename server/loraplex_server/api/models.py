"""The models that requests may name: the base and the adapters."""

from typing import Any

from fastapi import APIRouter

from loraplex_adapters.errors import AdapterNotFound
from loraplex_adapters.registry import Adapter
from loraplex_server.api.target import target_of
from loraplex_server.auth import Access, access
from loraplex_server.services import Services, Uses

router = APIRouter(tags=["models"])

OWNER = "loraplex"


@router.get("/v1/models")
@access(Access.USER)
async def list_models(services: Uses) -> dict[str, Any]:
    """The base under each of its names, then every adapter."""
    bases = [_base_card(services, name) for name in services.base.names]
    return {
        "object": "list",
        "data": bases + [_adapter_card(services, adapter) for adapter in services.registry.list()],
    }


@router.get("/v1/models/{model:path}")
@access(Access.USER)
async def retrieve_model(model: str, services: Uses) -> dict[str, Any]:
    """One model, by any name that a request may use: ``name``, ``alias``, ``name@version``."""
    if target_of(services, model).digest is None:
        return _base_card(services, model)
    return _adapter_card(services, services.registry.resolve(model))


def _base_card(services: Services, name: str) -> dict[str, Any]:
    base = services.base
    return {
        "id": name,
        "object": "model",
        "created": base.created_at,
        "owned_by": OWNER,
        "root": base.root,
        "parent": None,
        "max_model_len": services.worker.model_len,
    }


def _adapter_card(services: Services, adapter: Adapter) -> dict[str, Any]:
    state = services.worker.stats.adapters.get(adapter.digest)
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(adapter.created_at),
        "owned_by": OWNER,
        "root": adapter.source or adapter.digest,
        "parent": services.base.name,
        "max_model_len": services.worker.model_len,
        "loraplex": {
            "digest": adapter.digest,
            "version": adapter.version,
            "rank": _rank(services, adapter),
            "mode": adapter.default_mode,
            "residency": state.residency if state is not None else "disk",
        },
    }


def _rank(services: Services, adapter: Adapter) -> int | None:
    """The adapter's highest rank; None if it was deleted a moment ago."""
    try:
        return services.installer.store.manifest(adapter.digest).max_rank
    except AdapterNotFound:
        return None
