"""The gated activation against torch."""

import pytest
import torch

from tests.kernels.triton_support import DTYPES, assert_close, randn

from loraplex_server.kernels.activation import silu_mul  # isort: skip
from loraplex_server.kernels.activation_ref import silu_mul_ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 200), (2, 2816)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = 4 * randn(*shape, seed=0, dtype=dtype)
    assert_close(silu_mul(gate_up), silu_mul_ref(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_far_gates_neither_overflow_nor_vanish_wrongly() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 1e4, 2.0, 2.0, 2.0, 2.0]]).to(randn(1, seed=0).device)
    assert_close(silu_mul(gate_up), silu_mul_ref(gate_up))
