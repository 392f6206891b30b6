"""A device that is too small is said so in words, whether the base or what comes beside it does not fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraplex_server import engine_recipe
from loraplex_server.config import load_config
from loraplex_server.engine_recipe import PlannedBase, ServedBase
from loraplex_server.memory_plan import TooLittleMemory


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB.")


def test_a_base_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_recipe, "load", out_of_memory)
    config = load_config({"model": str(tmp_path)})
    recipe = ServedBase(tmp_path, torch.device("cpu"), config.model, config.engine, tmp_path, config.log)
    with pytest.raises(TooLittleMemory, match=r"the base does not fit \(CUDA out of memory\)\. Free memory on the GPU"):
        recipe.load(None)


def test_an_engine_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_recipe, "Engine", out_of_memory)
    decoder: Any = SimpleNamespace(spec=SimpleNamespace(eos_token_ids=(2,)), base_shape=None)
    limits: Any = None
    with pytest.raises(TooLittleMemory, match=r"beside the base.*--kv-cache-memory"):
        PlannedBase(decoder, limits, tmp_path).build(lambda: None)
