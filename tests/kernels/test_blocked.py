"""The CPU's blocked layout against torch's linear."""

import pytest
import torch
from torch.nn.functional import linear

from loraplex_server.kernels.blocked import block, blocked_linear, can_block

SHAPES = [(64, 64), (100, 36), (7, 3), (1152, 896)]


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_multiplies_as_torch_does(shape: tuple[int, int], rows: int) -> None:
    weight, x, bias = torch.randn(shape), torch.randn(rows, shape[1]), torch.randn(shape[0])
    blocked = block(weight)
    torch.testing.assert_close(blocked_linear(x, blocked), linear(x, weight), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(blocked_linear(x, blocked, bias), linear(x, weight, bias), rtol=1e-5, atol=1e-4)


def test_takes_rows_that_are_not_contiguous() -> None:
    weight, wide = torch.randn(32, 16), torch.randn(5, 40)
    found = blocked_linear(wide[:, 8:24], block(weight))
    torch.testing.assert_close(found, linear(wide[:, 8:24], weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_gives_the_weight_back(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(block(weight).to_dense(), weight)


def test_only_float32_is_blocked() -> None:
    assert not can_block(torch.zeros(8, 8, dtype=torch.float16))
