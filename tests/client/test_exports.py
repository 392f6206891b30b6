from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import loraplex_client


def test_exports_are_sorted_and_exist() -> None:
    assert loraplex_client.__all__ == sorted(loraplex_client.__all__)
    for name in loraplex_client.__all__:
        assert hasattr(loraplex_client, name)


def test_the_public_surface() -> None:
    assert [name for name in loraplex_client.__all__ if not name.endswith("Error")] == [
        "Adapter",
        "AdapterDeleted",
        "AdapterVersion",
        "AsyncLoraplex",
        "AsyncStream",
        "ChatCompletion",
        "ChatCompletionChunk",
        "Completion",
        "Loraplex",
        "Message",
        "ModelCard",
        "Served",
        "Stream",
        "Tokens",
        "Usage",
        "Version",
    ]


def test_the_client_is_typed_for_its_users() -> None:
    assert (Path(loraplex_client.__file__).parent / "py.typed").is_file()


def test_importing_the_client_loads_neither_server_nor_torch() -> None:
    check = "import sys, loraplex_client; print([m for m in ('torch', 'fastapi', 'loraplex_server', 'loraplex_adapters') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
