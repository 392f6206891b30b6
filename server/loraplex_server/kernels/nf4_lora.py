"""LoRA fused into the NF4 GEMM, for the rows of a decode step (up to 64, any mix of adapters and ranks).

Each adapter's A and B are read once, by tensor cores. With many rows v = A x is made by the launch that makes x
(``lora_produce``), with few by extra warps of the GEMM's CTAs, while the others multiply; these add B v before they
write their output. ``lora_rows_ref`` defines the result and the tables, which are read from device memory: a CUDA graph
captured once serves any mix of adapters. What cannot be fused (see ``can_fuse``) is the GEMM followed by ``lora.lora_rows``.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from loraplex_server.kernels import nf4_cuda
from loraplex_server.kernels.lora_args import BatchAdapters, FusedLoraError
from loraplex_server.kernels.lora_produce import Shrunk, shrink
from loraplex_server.kernels.lora_rows_ref import MAX_PARTS
from loraplex_server.kernels.nf4_config import (
    MAX_ROWS,
    SHARED_BYTES,
    Config,
    MmaConfig,
    RingConfig,
    token_tiles,
    with_room,
)
from loraplex_server.kernels.nf4_layout import RepackedNf4

_V_FLOATS = 3072  # LORA_V
_BATCH_BYTES = 16 + MAX_ROWS * (4 + 56) + 4 * _V_FLOATS
_ROW_TILE = 16
_MOST_WARPS = 14  # that multiply, so that the others leave them their registers


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
    x: Tensor | Shrunk,
    weight: RepackedNf4,
    out: Tensor,
    adapters: BatchAdapters,
    *,
    bias: Tensor | None = None,
    dependent: bool = True,
) -> None:
    """out = x @ W.T (+ bias) + each row's adapter delta, where ``can_fuse``; the same bits on every run.

    Shapes: x [T, K] and out [T, N], contiguous. An x that is not ``Shrunk`` is shrunk in the same launch where
    ``shrinks_beside``, else by a launch of its own first.
    The tables must be complete before the launch in front of this one begins: ``dependent`` launches read them early.
    Raises: FusedLoraError, nvrtc.KernelError.
    """
    rows = x.x if isinstance(x, Shrunk) else x
    m, k = rows.shape
    if adapters.arena.dtype != rows.dtype:
        raise FusedLoraError(f"the arena must be {rows.dtype}")
    config = fused_config(weight, m)
    warps, extra, workers, row_scale = _lora_warps(config), _BATCH_BYTES, 0, None
    if isinstance(config, MmaConfig):
        if isinstance(x, Shrunk):
            raise FusedLoraError(f"{m} rows are shrunk beside the GEMM, not before it")
        extra += _scratch_bytes(warps, m)
        # CTAs start in order, one a multiprocessor: those that others wait for must be among the first.
        workers = min(config.grid(weight.num_row_blocks), nf4_cuda.num_sms(rows.device.index) * 15 // 16)
    else:
        row_scale = (x if isinstance(x, Shrunk) else shrink(x, adapters, dependent=dependent)).row_scale
    args = adapters.arguments(k, part_starts=_part_starts(weight), row_scale=row_scale, workers=workers)
    epilogue = nf4_cuda.Epilogue(warps, args, extra)
    nf4_cuda.gemm(rows, weight, out, bias, dependent=dependent, config=config, lora=epilogue)


def shrinks_beside(weight: RepackedNf4, m: int) -> bool:
    """Whether the GEMM of ``m`` rows shrinks its input itself: with few rows that hides A behind the weights."""
    return isinstance(fused_config(weight, m), MmaConfig)


def fused_config(weight: RepackedNf4, m: int) -> Config:
    """The GEMM's configuration, with room for LoRA beside it."""
    config = nf4_cuda.config_for(weight, m)
    tokens, k_blocks = token_tiles(m, wgmma=not isinstance(config, MmaConfig)) * 8, weight.num_k_blocks
    if isinstance(config, RingConfig):
        return with_room(config, tokens, k_blocks, _BATCH_BYTES + 128)
    if config.wr * config.wk > _MOST_WARPS:
        wr = min(config.wr, _MOST_WARPS)
        config = replace(config, wr=wr, wk=_MOST_WARPS // wr)
    extra = _BATCH_BYTES + _scratch_bytes(_lora_warps(config), m) + 128
    fits = config.shared_bytes(tokens, k_blocks) + extra <= SHARED_BYTES
    return config if fits else replace(config, dx=1, xch=1)


def _lora_warps(config: Config) -> int:
    if isinstance(config, RingConfig):
        return 3  # of the warpgroup that copies
    return max(1, min(4, 16 - config.wr * config.wk))


def _scratch_bytes(warps: int, m: int) -> int:
    """Shared memory in which the warps that shrink add up."""
    return warps * token_tiles(m, wgmma=False) * 512


def _part_starts(weight: RepackedNf4) -> tuple[int, int]:
    parts = weight.part_rows
    first, second = (sum(parts[: i + 1]) if i + 1 < len(parts) else weight.num_out for i in range(2))
    return first, second
