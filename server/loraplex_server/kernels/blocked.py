"""Dense weights in the blocked layout that oneDNN multiplies fastest on a CPU. Defined by ``torch.nn.functional.linear``.

A plain matrix product of a few rows runs at half the speed: it reorders the weights at every call.
"""

import torch
from torch import Tensor

# The layout is chosen for this many rows; it serves any number.
_TYPICAL_ROWS = 8


def can_block(weight: Tensor) -> bool:
    """Whether ``weight`` [N, K] gains from the blocked layout here."""
    return weight.is_cpu and weight.dtype == torch.float32 and torch._C._has_mkldnn


def block(weight: Tensor) -> Tensor:
    """``weight`` [N, K] in the blocked layout: an opaque tensor of the same shape and size; ``to_dense`` undoes it."""
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return blocked


def blocked_linear(x: Tensor, blocked: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``. Shapes: x [T, K], blocked [N, K], bias [N] -> [T, N]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")
    return out
