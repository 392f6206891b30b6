"""Launches of the fused NF4 kernels on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_server.kernels import nvrtc
from loraplex_server.kernels.nf4_config import MAX_ROWS, Config, MmaConfig, choose, token_tiles
from loraplex_server.kernels.nf4_layout import RepackedNf4

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_MMA_TYPES = (_POINTER,) * 4 + (_INT, _INT, _INT, _FLOAT, _INT)
_WGMMA_TYPES = (_POINTER,) * 4 + (_INT, _INT, _INT, _FLOAT, _POINTER, _POINTER)
_DEQUANTIZE_TYPES = (_POINTER, _POINTER, _FLOAT, _INT, _INT, _INT)

# Dense panels of this many values stay in the L2 cache between the kernel that writes and the GEMM that reads them.
_PANEL_VALUES = 16 * 1024 * 1024


@functools.cache
def supported(device: int) -> bool:
    """Whether the fused kernels run on a device: Hopper or newer, with NVRTC."""
    return nvrtc.available() and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def has_wgmma(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def num_sms(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_workspaces: dict[int, tuple[Tensor, Tensor]] = {}


def _workspace(device: int, num_floats: int) -> tuple[Tensor, Tensor]:
    """Room for split sums, and zeroed counters, for one device.

    Launches on one device share it, so they must be ordered by a stream or by graph edges.
    """
    found = _workspaces.get(device)
    if found is None or found[0].numel() < num_floats:
        if torch.cuda.is_current_stream_capturing():
            raise nvrtc.LaunchError("run each shape once before capturing a CUDA graph: its workspace is not allocated")
        # One size for all shapes, so that a captured graph's addresses stay valid.
        floats = max(num_floats, num_sms(device) * MAX_ROWS * 256)
        counters = torch.zeros(8 * 1024, dtype=torch.int32, device=f"cuda:{device}")
        found = (torch.empty(floats, dtype=torch.float32, device=f"cuda:{device}"), counters)
        _workspaces[device] = found
    return found


@dataclass(frozen=True)
class Epilogue:
    """What LoRA adds to a GEMM's launch: warps of each CTA, arguments and shared memory."""

    warps: int
    args: ctypes.Structure
    shared_bytes: int


def _kernel(config: Config, tiles: int, k_blocks: int, half: bool, lora: Epilogue | None) -> nvrtc.Kernel:
    defines = {name.upper(): value for name, value in vars(config).items()}
    defines |= {"MT": tiles, "KB": k_blocks, "HALF": int(half)}
    mma = isinstance(config, MmaConfig)
    argtypes, block = _MMA_TYPES if mma else _WGMMA_TYPES, config.block
    shared = config.shared_bytes(tiles * 8, k_blocks)
    if lora is not None:
        defines["LORA"] = lora.warps
        argtypes = (*argtypes, type(lora.args), _INT)
        block += 32 * lora.warps
        shared = _aligned(shared) + lora.shared_bytes
    return nvrtc.load(
        "nf4_mma.cu" if mma else "nf4_wgmma.cu",
        "nf4_mma" if mma else "nf4_wgmma",
        argtypes,
        defines=defines,
        block=block,
        shared_bytes=shared,
        cluster=config.cl if isinstance(config, MmaConfig) else 1,
    )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128


def config_for(weight: RepackedNf4, m: int) -> Config:
    """The configuration for ``m`` rows on the weight's device."""
    device = weight.data.device.index
    return choose(weight.num_out, weight.num_in, m, num_sms(device), wgmma=has_wgmma(device))


def gemm(
    x: Tensor,
    weight: RepackedNf4,
    out: Tensor,
    bias: Tensor | None,
    *,
    dependent: bool,
    config: Config | None = None,
    lora: Epilogue | None = None,
) -> None:
    """out = x @ W.T (+ bias) for 1-64 rows, in one launch.

    Shapes: x [T, K] and out [T, N], contiguous, both bfloat16 or both float16; bias [N] in the same dtype.
    Raises: nvrtc.KernelError.
    """
    m = x.shape[0]
    config = config or config_for(weight, m)
    tiles = token_tiles(m, wgmma=not isinstance(config, MmaConfig))
    row_blocks, k_blocks = weight.num_row_blocks, weight.num_k_blocks
    kernel = _kernel(config, tiles, k_blocks, x.dtype == torch.float16, lora)
    tensors = [weight.data.data_ptr(), x.data_ptr(), out.data_ptr(), bias.data_ptr() if bias is not None else 0]
    args: list[int | float | ctypes.Structure] = [*tensors, m, weight.num_out]
    if isinstance(config, MmaConfig):
        args += [row_blocks * 4, weight.gain, config.receive_offset(m, k_blocks)]
    else:
        sums, counters = _workspace(x.device.index, config.workspace_floats(m, row_blocks))
        args += [row_blocks, weight.gain, sums.data_ptr(), counters.data_ptr()]
    if lora is not None:
        args += [lora.args, _aligned(config.shared_bytes(tiles * 8, k_blocks))]
    kernel.launch(config.grid(row_blocks), args, dependent=dependent)


def dequantize(weight: RepackedNf4, first_row: int, out: Tensor) -> None:
    """Rows ``first_row`` (a multiple of 64) and on, dense. Shape: out [rows, K], contiguous."""
    half = out.dtype == torch.float16
    kernel = nvrtc.load(
        "nf4_dequantize.cu", "nf4_dequantize", _DEQUANTIZE_TYPES, defines={"HALF": int(half)}, block=256
    )
    rows, k_blocks = out.shape[0], weight.num_k_blocks
    grid = -(-(-(-rows // 16) * k_blocks) // 8)
    kernel.launch(grid, [weight.data.data_ptr(), out.data_ptr(), weight.gain, first_row, rows, k_blocks])


def gemm_dense(x: Tensor, weight: RepackedNf4, out: Tensor, bias: Tensor | None) -> None:
    """out = x @ W.T (+ bias) for many rows: panels of W are made dense, and cuBLAS multiplies. Shapes: as ``gemm``."""
    panel = max(64, _PANEL_VALUES // weight.num_in // 64 * 64)
    scratch = torch.empty(min(panel, weight.num_out), weight.num_in, dtype=x.dtype, device=x.device)
    for first in range(0, weight.num_out, panel):
        rows = min(panel, weight.num_out - first)
        dequantize(weight, first, scratch[:rows])
        part = out[:, first : first + rows]
        if bias is None:
            torch.mm(x, scratch[:rows].T, out=part)
        else:
            torch.addmm(bias[first : first + rows], x, scratch[:rows].T, out=part)
