"""Quantizing a matrix to NF4 on a GPU, bit for bit as bitsandbytes does, without the seconds that its import takes."""

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_server.kernels import nvrtc
from loraplex_server.kernels.nf4_ref import BLOCKSIZE, NESTED_BLOCKSIZE

_WEIGHT_TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong)
_ABSMAX_TYPES = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)


class QuantizedNf4(NamedTuple):
    """The tensors of ``Nf4Weight`` with double quantization."""

    packed: Tensor
    absmax_codes: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor


def can_quantize(weight: Tensor) -> bool:
    """Whether ``quantize`` takes this matrix: 16 bits, on a GPU, in whole blocks of 64 values."""
    fits = weight.device.type == "cuda" and weight.dtype in (torch.bfloat16, torch.float16)
    return fits and weight.numel() > 0 and weight.numel() % BLOCKSIZE == 0 and nvrtc.available()


def quantize(weight: Tensor) -> QuantizedNf4:
    """Blocks of 64 values, their absmax quantized in blocks of 256. Raises: nvrtc.KernelError."""
    weight = weight.contiguous()
    device, num_blocks = weight.device, weight.numel() // BLOCKSIZE
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(num_blocks, dtype=torch.float32, device=device)
    defines = {"HALF": int(weight.dtype == torch.float16)}
    eights = weight.numel() // 8
    kernel = nvrtc.load("nf4_quantize.cu", "nf4_quantize", _WEIGHT_TYPES, defines=defines, block=256)
    kernel.launch(-(-eights // 256), [weight.data_ptr(), packed.data_ptr(), absmax.data_ptr(), eights])
    offset = absmax.mean()
    absmax -= offset
    table = dynamic_code().to(device)
    codes = torch.empty(num_blocks, dtype=torch.uint8, device=device)
    nested = torch.empty(-(-num_blocks // NESTED_BLOCKSIZE), dtype=torch.float32, device=device)
    kernel = nvrtc.load("nf4_quantize.cu", "nf4_quantize_absmax", _ABSMAX_TYPES, defines=defines, block=256)
    kernel.launch(
        len(nested), [absmax.data_ptr(), table.data_ptr(), codes.data_ptr(), nested.data_ptr(), num_blocks]
    )  # fmt: skip
    return QuantizedNf4(packed, codes, nested, table, offset)


@functools.cache
def dynamic_code() -> Tensor:
    """The 256 values of bitsandbytes' signed 8-bit dynamic type, in order: seven decades, each cut twice as fine as the
    one below it. Shape: [256] float32.

    Source: 8-bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561).
    """
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
