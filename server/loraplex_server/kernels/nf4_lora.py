"""LoRA fused into the NF4 GEMM, for the rows of a decode step (up to 64, any mix of adapters and ranks).

Each adapter's A and B are read once, by tensor cores, in the GEMM's own launch: extra warps of every CTA compute a part
of v = A x while the others multiply, and these add B v before they write their output. ``lora_rows_ref`` defines the result and the tables, which are read from device memory: a CUDA graph captured
once serves any mix of adapters. What cannot be fused (see ``can_fuse``) is the GEMM followed by ``lora.lora_rows``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex_server.kernels import nf4_cuda
from loraplex_server.kernels.lora_rows_ref import MAX_PARTS, RowGroups
from loraplex_server.kernels.nf4_config import MAX_ROWS, SHARED_BYTES, Config, MmaConfig, token_tiles
from loraplex_server.kernels.nf4_layout import RepackedNf4

_MAX_SLICES = 16
_STATE_WORDS = 2
_V_FLOATS = 3072  # LORA_V
_BATCH_BYTES = 16 + MAX_ROWS * (4 + 48) + 4 * _V_FLOATS
_ROW_TILE = 16
_MOST_WARPS = 14  # that multiply, so that the others leave them their registers
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class FusedLoraError(ValueError):
    """Tables or tensors that do not fit the matrix they are used with."""


class _LoraArgs(ctypes.Structure):
    _fields_ = [
        ("arena", _POINTER),
        ("table", _POINTER),
        ("slot_stride", ctypes.c_longlong),
        ("slots", _POINTER),
        ("starts", _POINTER),
        ("order", _POINTER),
        ("v", _POINTER),
        ("state", _POINTER),
        ("num_groups", _INT),
        ("v_stride", _INT),
        ("workers", _INT),
        ("part_start", _INT * 2),
    ]


@dataclass(frozen=True, slots=True)
class FusedLoraWorkspace:
    """What launches on one stream share: partial sums of v for 64 rows, and counters, zero between launches.

    Shapes: v [16, 64, rank_capacity] float32, state [2] int32. ``rank_capacity``: most ranks of a group, all its
    linears together.
    """

    v: Tensor
    state: Tensor

    @classmethod
    def allocate(cls, *, rank_capacity: int, device: torch.device | str) -> FusedLoraWorkspace:
        shape = (_MAX_SLICES, MAX_ROWS, -(-rank_capacity // 16) * 16)
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.zeros(_STATE_WORDS, dtype=torch.int32, device=device),
        )


def can_fuse(weight: RepackedNf4, num_rows: int) -> bool:
    """Whether ``nf4_lora_linear`` takes this matrix and number of rows."""
    device, rows = weight.data.device, weight.part_rows
    return (
        device.type == "cuda"
        and nf4_cuda.supported(device.index)
        and 0 < num_rows <= MAX_ROWS
        and len(rows) <= MAX_PARTS
        and all(count % _ROW_TILE == 0 for count in rows[:-1])
    )


def nf4_lora_linear(
    x: Tensor,
    weight: RepackedNf4,
    out: Tensor,
    *,
    arena: Tensor,
    table: Tensor,
    rows: RowGroups,
    workspace: FusedLoraWorkspace,
    bias: Tensor | None = None,
    dependent: bool = True,
) -> None:
    """out = x @ W.T (+ bias) + each row's adapter delta, where ``can_fuse``; the same bits on every run.

    Shapes: x [T, K] and out [T, N], contiguous; arena, table [slots, 8] and rows as in ``lora_rows_ref`` for the
    weight's parts; at most 64 groups of rows. arena has x's dtype.
    The tables must be complete before the launch in front of this one begins: ``dependent`` launches read them early.
    Raises: FusedLoraError, nvrtc.KernelError.
    """
    if arena.dtype != x.dtype or table.stride(1) != 1 or rows.slots.shape[0] > MAX_ROWS:
        raise FusedLoraError(f"the arena must be {x.dtype}, table rows contiguous, and groups at most {MAX_ROWS}")
    m = x.shape[0]
    config = fused_config(weight, m)
    # CTAs start in order, one a multiprocessor: those that others wait for must be among the first.
    workers = min(config.grid(weight.num_row_blocks), nf4_cuda.num_sms(x.device.index) * 15 // 16)
    args = _arguments(weight, arena, table, rows, workspace, workers)
    tiles = token_tiles(m, wgmma=not isinstance(config, MmaConfig))
    warps = _shrink_warps(config)
    epilogue = nf4_cuda.Epilogue(warps, args, _extra_bytes(warps, tiles))
    nf4_cuda.gemm(x, weight, out, bias, dependent=dependent, config=config, lora=epilogue)


def fused_config(weight: RepackedNf4, m: int) -> Config:
    """The GEMM's configuration, with room for LoRA beside it."""
    config = nf4_cuda.config_for(weight, m)
    tiles = token_tiles(m, wgmma=not isinstance(config, MmaConfig))
    if not isinstance(config, MmaConfig):
        if config.block == 512 or tiles > 4:
            config = replace(config, ab=1, p=4 if tiles <= 4 else 2)
        smaller: Config = replace(config, xc=4, nbuf=2)
    else:
        if config.wr * config.wk > _MOST_WARPS:
            wr = min(config.wr, _MOST_WARPS)
            config = replace(config, wr=wr, wk=_MOST_WARPS // wr)
        smaller = replace(config, dx=1, xch=1)
    extra = _extra_bytes(_shrink_warps(config), tiles) + 128
    fits = config.shared_bytes(tiles * 8, weight.num_k_blocks) + extra <= SHARED_BYTES
    return config if fits else smaller


def _shrink_warps(config: Config) -> int:
    return max(1, min(4, 16 - config.wr * config.wk)) if isinstance(config, MmaConfig) else 4


def _extra_bytes(warps: int, tiles: int) -> int:
    return _BATCH_BYTES + warps * tiles * 512


def _arguments(
    weight: RepackedNf4,
    arena: Tensor,
    table: Tensor,
    rows: RowGroups,
    workspace: FusedLoraWorkspace,
    workers: int,
) -> _LoraArgs:
    parts = weight.part_rows
    starts = [sum(parts[: i + 1]) if i + 1 < len(parts) else weight.num_out for i in range(2)]
    return _LoraArgs(
        arena=arena.data_ptr(),
        table=table.data_ptr(),
        slot_stride=table.stride(0) * table.element_size(),
        slots=rows.slots.data_ptr(),
        starts=rows.starts.data_ptr(),
        order=rows.order.data_ptr(),
        v=workspace.v.data_ptr(),
        state=workspace.state.data_ptr(),
        num_groups=rows.slots.shape[0],
        v_stride=workspace.v.shape[-1],
        workers=workers,
        part_start=(ctypes.c_int * 2)(*starts),
    )
