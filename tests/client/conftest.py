from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .drivers import Driver
from .servers import FakeServer, running


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAPLEX_BASE_URL", "LORAPLEX_API_KEY", "LORAPLEX_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(request.param)


@pytest.fixture
def adapter_directory(tmp_path: Path) -> Path:
    """What a trainer leaves: the adapter, and files that have no business on a server."""
    directory = tmp_path / "pirate"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"r": 8}')
    (directory / "adapter_model.safetensors").write_bytes(b"weights" * 20_000)
    (directory / "training_args.bin").write_bytes(b"pickle")
    (directory / "model.safetensors").write_bytes(b"the base")
    (directory / "README.md").write_text("card")
    return directory


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running(FakeServer()) as fake:
        yield fake
