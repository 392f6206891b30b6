"""Which weights answer a request: the base, or one version of an adapter."""

from dataclasses import dataclass

from loraplex_adapters.errors import AdapterNotFound
from loraplex_server.api.schemas import GenerationRequest
from loraplex_server.errors import ApiError
from loraplex_server.observer import Mode
from loraplex_server.services import Services

_MAX_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Target:
    """``model`` is the name as asked; ``adapter`` and ``digest`` are None for the base.

    ``label`` is what the answer's header says: ``name@version``, or ``base``.
    """

    model: str
    adapter: str | None
    digest: str | None
    label: str
    mode: Mode
    fingerprint: str


def target_of(services: Services, model: str) -> Target:
    """What a model name stands for at this moment. Raises ApiError (404), naming what there is."""
    base = services.base
    if model in base.names:
        return Target(model, None, None, "base", "base", f"fp_{base.fingerprint[:12]}")
    try:
        adapter = services.registry.resolve(model)
    except AdapterNotFound as error:
        raise ApiError(
            f"The model `{model[:140]}` does not exist. {_available(services)}",
            status=404,
            code="model_not_found",
            param="model",
        ) from error
    fingerprint = f"fp_{base.fingerprint[:12]}_{adapter.digest[:12]}"
    label = f"{adapter.name}@{adapter.version}"
    return Target(model, adapter.name, adapter.digest, label, "unmerged", fingerprint)


def check_adapter_fields(body: GenerationRequest) -> None:
    """Refuse what the adapter fields ask for and this server cannot do yet. Raises ApiError (400)."""
    if body.adapter_mode == "merged":
        raise ApiError(
            "`adapter_mode`: merged serving is not supported; use auto or unmerged.",
            param="adapter_mode",
            code="unsupported_value",
        )
    if body.adapters:
        raise ApiError(
            "`adapters`: mixes of adapters are not supported; name one adapter in `model`.",
            param="adapters",
            code="unsupported_value",
        )


def _available(services: Services) -> str:
    adapters = [adapter.name for adapter in services.registry.list()]
    names = [*services.base.names, *adapters]
    shown = ", ".join(f"`{name}`" for name in names[:_MAX_NAMES_SHOWN])
    more = len(names) - _MAX_NAMES_SHOWN
    return f"Available: {shown}{f' and {more} more (GET /v1/models)' if more > 0 else ''}."
