from pathlib import Path

import pytest

from loraplex_adapters.base import BaseShape
from loraplex_adapters.store import AdapterStore
from tests.adapters.making import tiny_base


@pytest.fixture
def base() -> BaseShape:
    return tiny_base()


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for one adapter."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    return folder
