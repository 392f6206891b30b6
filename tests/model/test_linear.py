"""Rows of a group's matrix, dense, whatever form it is kept in."""

import pytest
import torch

from loraplex_server.kernels.nf4 import Nf4Gemm, Nf4Weight
from loraplex_server.model.linear import DenseLinear, GroupLinear, Nf4Linear

PARTS = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (64, 32)]
PACKED = [Nf4Weight.quantize(part) for part in PARTS]


@pytest.mark.parametrize("span", [(0, 96), (0, 64), (64, 96), (10, 80), (70, 71)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_rows_are_those_of_the_stacked_parts(span: tuple[int, int], is_packed: bool) -> None:
    linear: GroupLinear = Nf4Linear(Nf4Gemm(PACKED)) if is_packed else DenseLinear(torch.cat(PARTS))
    whole = torch.cat([part.dequantize() for part in PACKED] if is_packed else PARTS)

    assert torch.equal(linear.rows(*span), whole[slice(*span)])
