"""What every test needs before its modules are imported."""

import os

# The models here are so small that a second thread costs more than it brings, and server processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which bitsandbytes or transformers may do before any test of a kernel.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutations", type=int, default=60, help="how many mutated adapters to try (1000 take a minute)")
