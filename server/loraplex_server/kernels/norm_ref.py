"""RMSNorm in plain torch: the definition that faster kernels are checked against."""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last dimension of ``x`` to a root mean square of one, then by ``weight``.

    The statistics are float32; the normalized value is cast to x's dtype before the weight is applied.
    Shapes: x [..., H], weight broadcastable to it.
    Source: arXiv 1910.07467, rounded as transformers' Llama does.
    """
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return (wide * torch.rsqrt(variance + eps)).to(x.dtype) * weight
