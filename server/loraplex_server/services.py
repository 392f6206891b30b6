"""What the HTTP side works with, put together once by whoever starts the server."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from loraplex_adapters.install import AdapterInstaller
from loraplex_adapters.registry import AdapterRegistry
from loraplex_server.auth import Access, Keys
from loraplex_server.engine.worker import Worker
from loraplex_server.observer import NullObserver, RequestObservers
from loraplex_server.time_limit import TimeLimit
from loraplex_server.tokenizer import Tokenizer


@dataclass(frozen=True)
class BaseModel:
    """The base model as clients see it.

    ``names``: what requests may call it, the first being its own. ``root``: where it came from. ``vocab_size``: rows of
    its embedding. ``created_at``: Unix seconds.
    """

    names: tuple[str, ...]
    root: str
    fingerprint: str
    vocab_size: int
    created_at: int

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class HttpLimits:
    """``max_body_bytes`` bounds every body but uploads, which their endpoints bound themselves."""

    max_body_bytes: int = 8 << 20
    template_timeout_s: float = 5.0
    drain_timeout_s: float = 60.0


@dataclass(frozen=True)
class Services:
    """Everything an endpoint may use.

    ``metrics`` watches each generation request. ``metrics_access``: who may read /metrics, None for nobody.
    """

    worker: Worker
    registry: AdapterRegistry
    installer: AdapterInstaller
    tokenizer: Tokenizer
    base: BaseModel
    keys: Keys = field(default_factory=Keys)
    metrics: RequestObservers = field(default_factory=NullObserver)
    metrics_access: Access | None = Access.OPEN
    limits: HttpLimits = field(default_factory=HttpLimits)


async def services_of(request: Request) -> Services:
    """The services of the app that a request came to."""
    services: Services = request.app.state.services
    return services


Uses = Annotated[Services, Depends(services_of)]
"""An endpoint's parameter: ``services: Uses``."""


async def template_time_of(request: Request) -> TimeLimit:
    """The time that the app's chat template may take."""
    limit: TimeLimit = request.app.state.template_time
    return limit


TemplateTime = Annotated[TimeLimit, Depends(template_time_of)]
