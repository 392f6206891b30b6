# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""RMSNorm in one pass over each row, alone or fused with the residual add before it. Defined by ``rms_norm_ref``."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, size, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    # No kernel writes the weight, so it may be read before the kernel ahead has finished.
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * size + cols, mask=mask, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + row * size + cols, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * size + cols, normed.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """``rms_norm_ref`` for rows of one shared weight.

    Shapes: x [T, H], rows contiguous; weight [H]; out [T, H] contiguous, may be x -> [T, H].
    """
    return _launch(x, None, weight, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Add ``x`` to ``residual`` in place, rounded to their dtype, and return the norm of the sum.

    Shapes: x [T, H], rows contiguous; residual [T, H] contiguous; weight [H]; out [T, H] contiguous, may be x -> [T, H].
    """
    return _launch(x, residual, weight, eps, out)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None) -> Tensor:
    num_tokens, size = x.shape
    if out is None:
        out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_tokens,)](
        x, x if residual is None else residual, weight, out, x.stride(0), size, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        **launch_options(x.device),
    )  # fmt: skip
    return out
