"""Rotary position embedding in plain torch: the definition that faster kernels are checked against."""

import torch
from torch import Tensor


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of every head by the angle of its token's position.

    Shapes: x [T, H, D]; cos, sin [T, 1, D / 2], in x's dtype.
    Source: RoFormer (arXiv 2104.09864), halves paired as in transformers.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
