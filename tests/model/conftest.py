"""Checkpoints that several tests of the model read."""

from pathlib import Path

import pytest

from tests.models import FAMILIES, make_checkpoint


@pytest.fixture(scope="session")
def family_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small float32 checkpoint of each family. Tests only read them."""
    return {family: make_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def copied(family_checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Llama checkpoint, to be spoiled."""
    for file in family_checkpoints["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path
