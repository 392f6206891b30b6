"""Quiet logs for the servers that run inside the tests, and a model for those that need a real one."""

from collections.abc import Iterator

import pytest
import structlog

from loraplex_server.model.decoder import Decoder
from tests.models import make_checkpoint


@pytest.fixture(autouse=True, scope="session")
def _quiet_logs() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), cache_logger_on_first_use=False)
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A random Llama of two layers, unquantized."""
    import torch

    from loraplex_server.model.loader import load

    checkpoint = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    return load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
