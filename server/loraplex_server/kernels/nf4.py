"""The seam through which the model multiplies by NF4 matrices.

``repack`` once at load, ``nf4_linear`` at every step. Up to 64 rows go through one fused kernel; more rows make the
matrix dense and multiply with cuBLAS; the CPU runs the definition. ``Nf4Gemm`` chooses once for a matrix, and
keeps bitsandbytes' form where the fused kernels cannot run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from loraplex_server.kernels import nf4_cuda
from loraplex_server.kernels.nf4_config import MAX_ROWS
from loraplex_server.kernels.nf4_dense import gemm_dense
from loraplex_server.kernels.nf4_layout import RepackedNf4, repack
from loraplex_server.kernels.nf4_ref import nf4_linear_ref
from loraplex_server.kernels.nf4_weight import Nf4FormatError, Nf4Weight

__all__ = ["MAX_ROWS", "Nf4FormatError", "Nf4Gemm", "Nf4Weight", "RepackedNf4", "nf4_linear", "repack"]

log = logging.getLogger(__name__)


def nf4_linear(
    x: Tensor, weight: RepackedNf4, out: Tensor | None = None, *, bias: Tensor | None = None, dependent: bool = True
) -> Tensor:
    """``x @ W.T (+ bias)`` for a repacked matrix, accumulated in float32, the same bits on every run.

    Shapes: x [T, K] bfloat16 or float16 (CPU: any float), out [T, N], bias [N].
    ``dependent``: let the launch overlap the end of the stream's previous kernel, as it safely may unless that kernel
    writes the weight itself.
    On a GPU every number of rows must have run once (see ``Nf4Gemm.warm_up``) before a CUDA graph is captured.
    Raises: nvrtc.KernelError.
    """
    if out is None:
        out = torch.empty(x.shape[0], weight.num_out, dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    x = x.contiguous()
    if x.device.type != "cuda":
        return out.copy_(torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias))
    if x.shape[0] <= MAX_ROWS and out.is_contiguous():
        nf4_cuda.gemm(x, weight, out, bias, dependent=dependent)
    else:
        gemm_dense(x, weight, out, bias)
    return out


class Nf4Gemm:
    """One NF4 matrix (or several stacked along N) in the form that multiplies fastest on its device."""

    def __init__(self, parts: Sequence[Nf4Weight]) -> None:
        """Take the parts, all on one device; their tensors may be freed afterwards.

        Raises: Nf4FormatError as ``repack`` does.
        """
        device = parts[0].device
        aligned = parts[0].shape[1] % 64 == 0
        self._repacked: RepackedNf4 | None = None
        self._parts: tuple[Nf4Weight, ...] = ()
        if device.type == "cuda" and aligned and nf4_cuda.supported(device.index):
            self._repacked = repack(parts)
        else:
            self._parts = tuple(parts)
            if device.type == "cuda":
                _log_fallback(torch.cuda.get_device_name(device))

    @property
    def repacked(self) -> RepackedNf4 | None:
        """The form that the fused kernels read; None where bitsandbytes' form is kept."""
        return self._repacked

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self._repacked.num_bytes if self._repacked else sum(part.num_bytes for part in self._parts)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor on the device."""
        if self._repacked is not None:
            return (self._repacked.data,)
        return tuple(tensor for part in self._parts for tensor in part.tensors().values())

    def unpack(self) -> tuple[Nf4Weight, ...]:
        """The parts in bitsandbytes' form, bit for bit."""
        return self._repacked.unpack() if self._repacked else self._parts

    def warm_up(self, num_rows: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> None:
        """Compile and load what multiplying by these numbers of rows needs, so that CUDA graphs can be captured."""
        if self._repacked is not None:
            device = self._repacked.data.device
            for rows in num_rows:
                self(torch.zeros(rows, self._repacked.num_in, dtype=dtype, device=device))

    def __call__(
        self, x: Tensor, out: Tensor | None = None, *, bias: Tensor | None = None, dependent: bool = True
    ) -> Tensor:
        """``x @ W.T (+ bias)``; shapes, types and errors as ``nf4_linear``."""
        if self._repacked is not None:
            return nf4_linear(x, self._repacked, out, bias=bias, dependent=dependent)
        y = torch.cat([_plain_linear(x, part) for part in self._parts], dim=-1)
        y = y if bias is None else y + bias
        return y if out is None else out.copy_(y)


def _plain_linear(x: Tensor, weight: Nf4Weight) -> Tensor:
    if x.device.type != "cuda":
        return nf4_linear_ref(x, weight)
    from bitsandbytes import matmul_4bit

    # bitsandbytes takes the codes as a transposed column.
    return cast(Tensor, matmul_4bit(x, weight.packed.view(-1, 1).t(), quant_state=weight.quant_state(x.dtype)))


@functools.cache
def _log_fallback(device_name: str) -> None:
    log.warning("the fused NF4 kernels do not run on %s: bitsandbytes multiplies instead, more slowly", device_name)
