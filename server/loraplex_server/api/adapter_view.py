"""An adapter as the admin calls show it."""

from typing import Any

from loraplex_adapters.registry import Adapter, AdapterVersion
from loraplex_server.services import Services


def show_adapter(services: Services, adapter: Adapter) -> dict[str, Any]:
    """The adapter's JSON. Times in Unix seconds. Raises: AdapterNotFound if it was deleted a moment ago."""
    manifest = services.installer.store.manifest(adapter.digest)
    states = services.worker.stats.adapters
    versions = services.registry.versions(adapter.name)
    current = states.get(adapter.digest)
    # Requests that began on an earlier version still run on it.
    in_use = [states[digest] for digest in {version.digest for version in versions} if digest in states]
    return {
        "object": "adapter",
        "name": adapter.name,
        "digest": adapter.digest,
        "version": adapter.version,
        "base": services.base.name,
        "ranks": {"min": manifest.min_rank, "max": manifest.max_rank},
        "rank": manifest.max_rank,
        "target_modules": list(manifest.target_modules),
        "features": list(manifest.features),
        "num_parameters": manifest.num_parameters,
        "num_bytes": manifest.num_bytes,
        "residency": current.residency if current is not None else "disk",
        "pinned": adapter.pinned,
        "default_mode": adapter.default_mode,
        "aliases": list(adapter.aliases),
        "requests_running": sum(state.num_running for state in in_use),
        "requests_waiting": sum(state.num_waiting for state in in_use),
        "source": adapter.source,
        "created_at": int(adapter.created_at),
        "updated_at": int(adapter.updated_at),
        "versions": [show_version(version, adapter) for version in versions],
    }


def show_version(version: AdapterVersion, adapter: Adapter) -> dict[str, Any]:
    """One version's JSON; ``current`` is the one that answers to the name."""
    return {
        "version": version.version,
        "digest": version.digest,
        "created_at": int(version.created_at),
        "source": version.source,
        "current": version.version == adapter.version,
    }
