"""The rotary embedding reference against transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loraplex_server.kernels.rope_ref import rope_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_is_that_of_transformers(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 4, 6, 8, dtype=dtype), torch.randn(1, 2, 6, 8, dtype=dtype)
    angles = torch.randn(6, 4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wanted_q, wanted_k = apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None])
    heads = torch.cat((q, k), dim=1)[0].transpose(0, 1)
    found = rope_ref(heads, cos[:, None], sin[:, None]).transpose(0, 1)
    assert torch.equal(found[:4], wanted_q[0])
    assert torch.equal(found[4:], wanted_k[0])
