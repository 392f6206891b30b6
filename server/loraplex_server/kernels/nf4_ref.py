"""NF4 in plain torch: the definition that every faster path is tested against.

A value is ``NF4_CODE[code] * absmax`` in float32, cast once at the end. With double quantization
``absmax = nested_code[absmax_code] * nested_absmax[block // 256] + offset``, each operation rounded to float32.
Source: QLoRA (arXiv 2305.14314); byte order, table and rounding as in bitsandbytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loraplex_server.kernels.nf4_weight import Nf4Weight

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def absmax_ref(weight: Nf4Weight) -> Tensor:
    """The float32 absmax of every 64-value block, with double quantization undone. Shape: [ceil(N*K / 64)]."""
    if weight.absmax is not None:
        return weight.absmax
    codes, scales, table, offset = weight.nested
    values = table[codes.long()]
    values = values * scales.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return values + offset


def dequantize_nf4_ref(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every value as ``NF4_CODE[code] * absmax`` in float32, then cast to ``dtype``. Shape: [N, K]."""
    num_out, num_in = weight.shape
    table = torch.tensor(NF4_CODE, dtype=torch.float32, device=weight.packed.device)
    packed = weight.packed.reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[: num_out * num_in]
    values = table[codes.int()]
    absmax = absmax_ref(weight)
    if values.numel() % BLOCKSIZE == 0:
        values = (values.view(-1, BLOCKSIZE) * absmax.view(-1, 1)).view(-1)
    else:
        values = values * absmax.repeat_interleave(BLOCKSIZE)[: values.numel()]
    return values.view(num_out, num_in).to(dtype)


def nf4_linear_ref(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T (+ bias)`` with W dequantized to x's dtype.

    Shapes: x [..., K], bias [N] -> [..., N].
    """
    return torch.nn.functional.linear(x, dequantize_nf4_ref(weight, x.dtype), bias)
