"""What a change of names means for the engine and the disk: pins, warm-ups, and the end of an adapter."""

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import Depends, Request

from loraplex_adapters.errors import AdapterError
from loraplex_adapters.registry import Adapter
from loraplex_server.engine.worker import EngineCallFailed, EngineStopped
from loraplex_server.services import Services

_log = structlog.get_logger("loraplex.adapters")


@dataclass(frozen=True)
class Retired:
    """A name that is gone. ``freed_bytes``: what its contents gave back, None while requests still use them."""

    adapter: Adapter
    freed_bytes: int | None


class AdapterChanges:
    """Carries changes of one app's adapters out; what outlasts its call runs on."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._draining: set[str] = set()

    async def retire(self, services: Services, name: str, timeout_s: float) -> Retired:
        """Retire a name and free what nothing else uses, waiting up to ``timeout_s`` for its last request.

        Later than that it is freed all the same. Raises: AdapterNotFound, AdapterPinned.
        """
        registry = services.registry
        digests = {version.digest for version in registry.versions(name)}
        adapter = await asyncio.to_thread(registry.retire, name)
        unused = digests - registry.digests_in_use()
        task = self.run(self._free(services, unused))
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        return Retired(adapter, task.result() if done else None)

    def warm(self, services: Services, digest: str) -> None:
        """Bring an adapter to the device in the background."""
        self.run(_warm(services, digest))

    def run(self, work: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
        """Start work that may outlast the call that asked for it; an unreferenced task could vanish half-way."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _free(self, services: Services, digests: set[str]) -> int:
        """Wait for each digest's last request, then free its memory and its place on disk; the bytes of memory."""
        self._draining |= digests
        try:
            freed = await asyncio.gather(*(_release(services, digest) for digest in digests))
        finally:
            self._draining -= digests
        # A name that came back meanwhile keeps its content.
        await asyncio.to_thread(services.installer.discard_unused, keep=set(self._draining))
        return sum(freed)


def apply_pins(services: Services, digests: Iterable[str]) -> None:
    """Tell the engine of each digest whether any name that stands for it is pinned."""
    pinned = {adapter.digest for adapter in services.registry.list() if adapter.pinned}
    for digest in set(digests):
        services.worker.pin(digest, digest in pinned)


async def _release(services: Services, digest: str) -> int:
    try:
        return await services.worker.release(digest)
    except EngineStopped:
        return 0


async def _warm(services: Services, digest: str) -> int:
    try:
        await services.worker.warm(digest)
    except (EngineCallFailed, EngineStopped, AdapterError) as error:
        _log.warning("warm-up failed", digest=digest[:12], reason=str(error)[:200])
    return 0


async def _changes_of(request: Request) -> AdapterChanges:
    changes: AdapterChanges = request.app.state.adapter_changes
    return changes


Changes = Annotated[AdapterChanges, Depends(_changes_of)]
"""An endpoint's parameter: ``changes: Changes``."""
