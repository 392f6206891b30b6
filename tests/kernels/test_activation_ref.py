"""The gated activation reference against its formula."""

import torch

from loraplex_server.kernels.activation_ref import silu_mul_ref


def test_silu_mul_gates_the_second_half_by_the_first() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    found = silu_mul_ref(torch.cat((gate, up), dim=-1))
    torch.testing.assert_close(found, gate * torch.sigmoid(gate) * up)
