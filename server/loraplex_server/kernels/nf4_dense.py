"""Products of many rows with NF4 matrices: the matrix is made dense once, and cuBLAS multiplies.

What that costs (a read of the codes, a write and a read of the dense matrix) is shared by all rows of the launch, so
it pays from about a hundred rows on.
"""

import ctypes
from typing import Final

import torch
from torch import Tensor

from loraplex_server.kernels import nvrtc
from loraplex_server.kernels.nf4_layout import RepackedNf4

_TYPES: Final = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int)
_scratch: dict[int, Tensor] = {}


def dequantize(weight: RepackedNf4, out: Tensor) -> None:
    """The stacked matrix, dense. Shape: out [N, K], contiguous, bfloat16 or float16."""
    half = out.dtype == torch.float16
    kernel = nvrtc.load("nf4_dequantize.cu", "nf4_dequantize", _TYPES, defines={"HALF": int(half)}, block=256)
    rows, k_blocks = out.shape[0], weight.num_k_blocks
    grid = -(-(-(-rows // 16) * k_blocks) // 8)
    kernel.launch(grid, [weight.data.data_ptr(), out.data_ptr(), weight.gain, rows, k_blocks])


def gemm_dense(x: Tensor, weight: RepackedNf4, out: Tensor, bias: Tensor | None) -> None:
    """out = x @ W.T (+ bias), as accurate and as repeatable as cuBLAS.

    Which of its kernels cuBLAS takes, and so the last bits of a row, depends on the number of rows.
    Shapes: x [T, K] and out [T, N], rows contiguous, both bfloat16 or both float16; bias [N] in the same dtype.
    """
    shape = (weight.num_out, weight.num_in)
    dense = _room(shape[0] * shape[1], x).view(shape)
    dequantize(weight, dense)
    if bias is None:
        torch.mm(x, dense.T, out=out)
    else:
        torch.addmm(bias, x, dense.T, out=out)


def _room(num_values: int, like: Tensor) -> Tensor:
    """Where the next dense matrix goes: one place a device, used again by every launch that a stream orders.

    A CUDA graph gets its own, because this one may be replaced by a larger one.
    """
    if torch.cuda.is_current_stream_capturing():
        return like.new_empty(num_values)
    found = _scratch.get(like.device.index)
    if found is None or found.numel() < num_values or found.dtype != like.dtype:
        # The smaller one first: the caching allocator may then give its memory to the larger.
        _scratch.pop(like.device.index, None)
        found = _scratch[like.device.index] = like.new_empty(num_values)
    return found[:num_values]
