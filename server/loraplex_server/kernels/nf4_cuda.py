"""Launches of the fused NF4 kernels on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex_server.kernels import nvrtc, tensor_map
from loraplex_server.kernels.nf4_config import MAX_ROWS, Config, MmaConfig, RingConfig, choose, token_tiles
from loraplex_server.kernels.nf4_layout import RepackedNf4

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_MMA_TYPES = (_POINTER,) * 4 + (_INT, _INT, _INT, _FLOAT, _INT)
_RING_TYPES = (_POINTER, tensor_map.TensorMap, _POINTER, _POINTER, _INT, _INT, _INT, _FLOAT, _POINTER, _POINTER)
_SOURCES: dict[type[Config], tuple[str, str, tuple[Any, ...]]] = {
    MmaConfig: ("nf4_mma.cu", "nf4_mma", _MMA_TYPES),
    RingConfig: ("nf4_ring.cu", "nf4_ring", _RING_TYPES),
}


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
    source, name, argtypes = _SOURCES[type(config)]
    block, shared = config.block, config.shared_bytes(tiles * 8, k_blocks)
    if lora is not None:
        defines["LORA"] = lora.warps
        argtypes = (*argtypes, type(lora.args), _INT)
        shared = _aligned(shared) + lora.shared_bytes
        if not isinstance(config, RingConfig):  # which has warps to spare
            block += 32 * lora.warps
    return nvrtc.load(
        source, name, argtypes, defines=defines, block=block, shared_bytes=shared, cluster=config.num_clustered
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
    x_arg: int | ctypes.Structure = x.data_ptr()
    if isinstance(config, RingConfig):
        x_arg = tensor_map.rows_by_64(x, tiles * 8, config.xc)
    tensors = [weight.data.data_ptr(), x_arg, out.data_ptr(), bias.data_ptr() if bias is not None else 0]
    args: list[int | float | ctypes.Structure] = [*tensors, m, weight.num_out]
    if isinstance(config, MmaConfig):
        args += [row_blocks * 4, weight.gain, config.receive_offset(m, k_blocks)]
    else:
        sums, counters = _workspace(x.device.index, config.workspace_floats(m, row_blocks))
        args += [row_blocks, weight.gain, sums.data_ptr(), counters.data_ptr()]
    if lora is not None:
        args += [lora.args, _aligned(config.shared_bytes(tiles * 8, k_blocks))]
    kernel.launch(config.grid(row_blocks), args, dependent=dependent)
