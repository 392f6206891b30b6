"""The gated activation of the MLP in plain torch: the definition that faster kernels are checked against."""

from torch import Tensor
from torch.nn.functional import silu


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``. Shapes: gate_up [T, 2I], gate in the first half of the columns -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
