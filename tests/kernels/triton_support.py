"""Where Triton kernels are tested: on a CUDA device if there is one, else on the CPU by Triton's interpreter."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Read when a kernel is decorated, so before its module is imported.
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

if not ON_GPU:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: type, scope: Any) -> None:
        """Loop bounds that are tensors: Triton 3.6 converts them in a way that NumPy 2.4 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index

DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")

# The interpreter truncates to bfloat16 where a device rounds.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]

# Relative Frobenius error against the reference in float32; a few units in the last place of the output's dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Relative Frobenius error within the one tolerance table, and no NaN."""
    assert got.shape == expected.shape
    difference = (got.double() - expected.double()).norm()
    assert bool(torch.isfinite(got).all())
    assert difference <= TOLERANCE[got.dtype] * expected.double().norm() + 1e-12, difference
