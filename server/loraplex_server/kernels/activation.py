# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The gated activation of the MLP, one pass. Defined by ``silu_mul_ref``."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, row_stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up_ptr + row * row_stride + cols, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * row_stride + size + cols, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    # Rounded between the two steps, as torch rounds silu's result before it is multiplied.
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    product = activated * up.to(tl.float32)
    tl.store(out_ptr + row * size + cols, product.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``.

    Shapes: gate_up [T, 2I], gate in the first half of the columns, rows contiguous; out [T, I] contiguous -> [T, I].
    """
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        _silu_mul_kernel[(num_tokens, triton.cdiv(size, _BLOCK))](
            gate_up, out, gate_up.stride(0), size, BLOCK=_BLOCK, num_warps=4, **launch_options(gate_up.device)
        )
    return out
