"""The launches that make a GEMM's input and, beside it, shrink that input by the batch's adapters: v = A x.

v is left in the workspace, in parts that the GEMM's epilogue adds up (``nf4_lora``). Nothing of it depends on the other
rows of a batch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from loraplex_server.kernels import nf4_cuda, nvrtc
from loraplex_server.kernels.lora_args import BatchAdapters, FusedLoraError, LoraArgs

_THREADS = 256
_PIECE = 8  # elements of 16 bytes
_POINTER = ctypes.c_void_p
_TYPES = (_POINTER,) * 6 + (ctypes.c_float, ctypes.c_int, LoraArgs)
_GATED = 2  # pieces of a thread that makes silu(gate) * up
# CTAs that shrink, for each multiprocessor: as many as run at once, since a start costs them a trip to memory.
_SHRINKING = 2


class _Source(IntEnum):
    GIVEN = 0
    NORM = 1
    SILU = 2


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A GEMM's input x [T, K] whose v is in the workspace, up to ``row_scale`` [64] if there is one."""

    x: Tensor
    row_scale: Tensor | None = None


def shrink(x: Tensor, adapters: BatchAdapters, *, dependent: bool = True) -> Shrunk:
    """v of an x [T, K] that exists already; contiguous, T at most 64, K a multiple of 64."""
    _launch(_Source.GIVEN, x, None, None, None, x, adapters, 0.0, dependent)
    return Shrunk(x)


def add_norm_shrink(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, adapters: BatchAdapters, *, dependent: bool = True
) -> tuple[Shrunk, Tensor]:
    """The norm of residual + x (of x without a residual), its v, and the sum, rounded to their dtype.

    Shapes: x, residual [T, K] contiguous, T at most 64, K a multiple of 64; weight [K]. ``residual`` is not written to.
    Defined by ``rms_norm_ref`` and ``lora_rows_ref``.
    """
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    _launch(_Source.NORM, x, residual, total, weight, out, adapters, eps, dependent)
    return Shrunk(out, adapters.workspace.row_scale), total


def silu_mul_shrink(gate_up: Tensor, adapters: BatchAdapters, *, dependent: bool = True) -> Shrunk:
    """silu(gate) * up and its v.

    Shapes: gate_up [T, 2K] contiguous, T at most 64, K a multiple of 64. Defined by ``silu_mul_ref`` and
    ``lora_rows_ref``.
    """
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _launch(_Source.SILU, gate_up, None, None, None, out, adapters, 0.0, dependent)
    return Shrunk(out)


def _launch(
    source: _Source,
    given: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    out: Tensor,
    adapters: BatchAdapters,
    eps: float,
    dependent: bool,
) -> None:
    m, k = out.shape
    if k % 64 or adapters.arena.dtype != out.dtype or not given.is_contiguous():
        raise FusedLoraError(f"needs contiguous rows of a multiple of 64 columns in the arena's {adapters.arena.dtype}")
    tiles = next(size for size in (1, 2, 4, 8) if m <= size * 8)
    defines = {
        "SOURCE": int(source),
        "COLUMNS": k,
        "MT": tiles,
        "HALF": int(out.dtype == torch.float16),
        "RESIDUAL": int(residual is not None),
    }
    kernel = nvrtc.load("lora_produce.cu", "lora_produce", _TYPES, defines=defines, block=_THREADS)
    producers = {_Source.GIVEN: 0, _Source.NORM: m, _Source.SILU: m * -(-k // (_PIECE * _THREADS * _GATED))}[source]
    shrinking = _SHRINKING * nf4_cuda.num_sms(out.device.index)
    row_scale = adapters.workspace.row_scale
    pointers = [0 if t is None else t.data_ptr() for t in (given, residual, total, weight, out, row_scale)]
    kernel.launch(producers + shrinking, [*pointers, eps, producers, adapters.arguments(k)], dependent=dependent)
