"""The RMSNorm reference against transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loraplex_server.kernels.norm_ref import rms_norm_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(32, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(32))
    x = torch.randn(5, 32, dtype=dtype) * 3
    assert torch.equal(rms_norm_ref(x, module.weight, 1e-5), module(x))


def test_rms_norm_takes_one_weight_a_head() -> None:
    x, weight = torch.randn(5, 3, 8), torch.randn(3, 8)
    found = rms_norm_ref(x, weight, 1e-6)
    for head in range(3):
        torch.testing.assert_close(found[:, head], rms_norm_ref(x[:, head], weight[head], 1e-6))
