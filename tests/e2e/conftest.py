"""One server for all tests that leave it as they found it."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import ServerProcess, serving

MAX_ADAPTER_BYTES = 4 << 20


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model behind keys, small enough limits to reach, and one folder to load adapters from."""
    folder = tmp_path_factory.mktemp("server")
    root = folder / "allowed"
    root.mkdir()
    flags = ("--max-adapter-bytes", str(MAX_ADAPTER_BYTES), "--adapter-root", str(root))
    with serving(folder / "data", *flags) as running:
        yield running


@pytest.fixture(scope="session")
def adapter_root(server: ServerProcess) -> Path:
    return server.data_dir.parent / "allowed"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
