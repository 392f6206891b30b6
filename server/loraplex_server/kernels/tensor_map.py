"""Descriptors of tensors for the GPU's bulk tensor copies, made by the CUDA driver on the host."""

from __future__ import annotations

import ctypes
import functools

from torch import Tensor

from loraplex_server.kernels import nvrtc

_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_UINT16, _SWIZZLE_128, _PROMOTE_256 = 1, 3, 3


class TensorMap(ctypes.Structure):
    """``CUtensorMap``, passed to a kernel by value."""

    _fields_ = [("opaque", ctypes.c_uint64 * (_MAP_BYTES // 8))]


def rows_by_64(x: Tensor, num_rows: int, num_blocks: int) -> TensorMap:
    """Boxes of ``num_blocks`` blocks of 64 columns, of each block ``num_rows`` rows, in shared memory's 128-byte swizzle.

    Shapes: x [T, K], contiguous, 16-bit, K a multiple of 64, 16-byte aligned. Rows past T and blocks past K are zero.
    Raises: nvrtc.LaunchError.
    """
    return _rows_by_64(x.data_ptr(), x.shape[0], x.shape[1], num_rows, num_blocks)


@functools.lru_cache(4096)
def _rows_by_64(pointer: int, rows: int, columns: int, num_rows: int, num_blocks: int) -> TensorMap:
    room = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    at = -(-ctypes.addressof(room) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    sizes = (ctypes.c_uint64 * 3)(64, rows, columns // 64)
    strides = (ctypes.c_uint64 * 2)(columns * 2, 128)  # bytes, of the second and third dimension
    box, steps = (ctypes.c_uint32 * 3)(64, num_rows, num_blocks), (ctypes.c_uint32 * 3)(1, 1, 1)
    failed = nvrtc.driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), _UINT16, 3, ctypes.c_void_p(pointer), sizes, strides, box, steps, 0, _SWIZZLE_128,
        _PROMOTE_256, 0,
    )  # fmt: skip
    nvrtc.check(failed, f"tensor map of [{rows}, {columns}]")
    return TensorMap.from_buffer_copy((ctypes.c_char * _MAP_BYTES).from_address(at))
