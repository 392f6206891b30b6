"""RMSNorm against transformers' rounding."""

import pytest
import torch

from tests.kernels.triton_support import DEVICE, DTYPES, assert_close, randn

from loraplex_server.kernels.norm import add_rms_norm, rms_norm  # isort: skip
from loraplex_server.kernels.norm_ref import rms_norm_ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (5, 1536)])
def test_rows_are_normalized(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, seed=0, dtype=dtype), randn(shape[1], seed=1, dtype=dtype)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_takes_the_sum_exactly_and_the_norm_reads_it(dtype: torch.dtype) -> None:
    x, residual = randn(4, 320, seed=2, dtype=dtype), randn(4, 320, seed=3, dtype=dtype)
    weight = randn(320, seed=4, dtype=dtype)
    total = residual + x
    normed = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert_close(normed, rms_norm_ref(total, weight, 1e-6))


def test_out_may_be_the_input_and_rows_may_be_a_slice() -> None:
    wide, weight = randn(3, 96, seed=5), randn(64, seed=6)
    expected = rms_norm_ref(wide[:, :64], weight, 1e-5)
    assert_close(rms_norm(wide[:, :64], weight, 1e-5), expected)
    x = wide[:, :64].contiguous()
    assert rms_norm(x, weight, 1e-5, out=x) is x
    assert_close(x, expected)


def test_no_rows() -> None:
    empty = torch.empty(0, 64, device=DEVICE)
    assert rms_norm(empty, randn(64, seed=7), 1e-5).shape == (0, 64)
