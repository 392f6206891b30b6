"""A decode step's attention in one launch: rotary embedding, the write of the new key and value, and attention.

On Hopper and later CUDA compiled at run time does all three; elsewhere, and for shapes it does not take, three Triton
kernels do. Defined by ``attend_rows_ref``.
"""

import ctypes
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loraplex_server.kernels import nvrtc
from loraplex_server.kernels.attention_decode import DecodeWorkspace, paged_decode
from loraplex_server.kernels.rope_cache import rope_and_cache

# Keys of one split at least, and splits of a sequence at most.
SPLIT: Final = 256
MAX_SPLITS: Final = 16

# Tiles that a warp has in flight: two CTAs then fill a multiprocessor's shared memory.
_SLOTS: Final = 3
_WARPS: Final = 4
_TILE: Final = 16

# CTAs that run at once on an H200. The keys of a row are shared by several only while there are fewer rows and key heads
# than multiprocessors.
_AT_ONCE: Final = 264
_ENOUGH: Final = 128


class _Args(ctypes.Structure):
    """``Args`` of attention_rows.cu."""

    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in (
                "qkv", "keys", "values", "tables", "lens", "cos", "sin", "norm", "out", "partial", "counters",
            )
        ],
        *[(name, ctypes.c_int) for name in ("table_stride", "lanes", "window")],
        *[(name, ctypes.c_float) for name in ("scale_log2", "eps")],
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowsWorkspace:
    """What splits of long sequences are kept in until they are joined; reused by every layer and step, never by two
    streams at once. ``triton`` is set where the Triton kernels run.

    Shapes: partial [floats] float32; counters [B * Hkv] int32, all zero between launches.
    """

    partial: Tensor
    counters: Tensor
    triton: DecodeWorkspace | None

    @classmethod
    def allocate(
        cls,
        *,
        max_sequences: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "RowsWorkspace":
        fused = takes(num_heads, num_kv_heads, head_dim, block_size, dtype, device)
        triton, units = None, min(max_sequences * num_kv_heads, _ENOUGH)
        if not fused:
            units = 0
            triton = DecodeWorkspace.allocate(
                max_sequences=max_sequences,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                device=device,
            )
        floats = units * MAX_SPLITS * _WARPS * (head_dim // 4 + 4) * 32
        return cls(
            torch.empty(floats, dtype=torch.float32, device=device),
            torch.zeros(max_sequences * num_kv_heads, dtype=torch.int32, device=device),
            triton,
        )

    @property
    def num_bytes(self) -> int:
        fused = self.partial.nbytes + self.counters.nbytes
        return fused + (self.triton.num_bytes if self.triton is not None else 0)


def takes(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the CUDA kernel runs these shapes on this device."""
    fits = head_dim in (64, 128) and num_heads // num_kv_heads <= 8 and block_size % _TILE == 0 and dtype.itemsize == 2
    if not fits or device.type != "cuda" or not nvrtc.available():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def attend_rows(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    workspace: RowsWorkspace,
    *,
    qk_norm: Tensor | None = None,
    eps: float = 0.0,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``attend_rows_ref``; a row whose ``kv_lens`` is 0 (padding) becomes zeros and writes nothing.

    ``block_tables``, ``kv_lens`` and the cached keys and values are read before the launch ahead has ended. A kernel that
    lets its successors start early (see ``launch_options``) may write them only if an ordinary launch comes between it and
    this one. qkv, the tables of cosines, the norms and the caches are contiguous and of one dtype.
    """
    num_rows, width = qkv.shape
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_heads = width // head_dim - 2 * num_kv_heads
    if out is None:
        out = torch.empty((num_rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_rows == 0:
        return out
    if workspace.triton is not None:
        rope_and_cache(qkv, positions, cos, sin, kv_slots, k_cache, v_cache, qk_norm=qk_norm, eps=eps)
        q = qkv[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
        return paged_decode(q, k_cache, v_cache, block_tables, kv_lens, workspace.triton, window=window, out=out)
    group = num_heads // num_kv_heads
    kernel = nvrtc.load(
        "attention_rows.cu",
        "attend_rows",
        (_Args,),
        defines={
            "D": head_dim, "GROUP": group, "HEADS": num_kv_heads, "BLOCK": block_size, "SLOTS": _SLOTS, "SPLIT": SPLIT,
            "MAX_SPLITS": MAX_SPLITS, "NORM": int(qk_norm is not None), "HALF": int(qkv.dtype == torch.float16),
        },
        block=_WARPS * 32,
        shared_bytes=_shared_bytes(head_dim),
    )  # fmt: skip
    lanes = num_lanes(num_rows * num_kv_heads, block_tables.shape[1] * block_size)
    args = _Args(
        qkv.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), block_tables.data_ptr(), kv_lens.data_ptr(),
        cos.data_ptr(), sin.data_ptr(), 0 if qk_norm is None else qk_norm.data_ptr(), out.data_ptr(),
        workspace.partial.data_ptr(), workspace.counters.data_ptr(), block_tables.stride(0), lanes, window or 0,
        head_dim**-0.5 * 1.4426950408889634, eps,
    )  # fmt: skip
    kernel.launch(num_rows * num_kv_heads * lanes, [args], dependent=True)
    return out


def num_lanes(num_units: int, longest: int) -> int:
    """CTAs that share the keys of one row and key head, for ``num_units`` of those and ``longest`` keys at most."""
    if num_units >= _ENOUGH:
        return 1
    return min(MAX_SPLITS, -(-longest // SPLIT), _AT_ONCE // num_units)


def _shared_bytes(head_dim: int) -> int:
    """``Shared`` of attention_rows.cu, rounded up, and the tiles in flight."""
    fixed = 2 * 8 * (head_dim + 8) + 2 * 4 * head_dim + 4 * 8 + 2 * 4 * _WARPS * 8 + 4
    return -(-fixed // 128) * 128 + _WARPS * _SLOTS * 2 * _TILE * head_dim * 2
