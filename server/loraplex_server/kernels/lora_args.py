"""What the CUDA kernels for LoRA are told: where a batch's adapters lie, and the workspace of v = A x."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loraplex_server.kernels.lora_rows_ref import RowGroups
from loraplex_server.kernels.nf4_config import MAX_ROWS

MAX_SLICES: Final = 16
# Columns of x that one slice has at least.
_SLICE_COLUMNS: Final = 512
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class FusedLoraError(ValueError):
    """Tables or tensors that do not fit the matrix they are used with."""


class LoraArgs(ctypes.Structure):
    """``LoraArgs`` of cuda/lora_tables.cuh."""

    _fields_ = [
        ("arena", _POINTER),
        ("table", _POINTER),
        ("slot_stride", ctypes.c_longlong),
        ("slots", _POINTER),
        ("starts", _POINTER),
        ("order", _POINTER),
        ("v", _POINTER),
        ("row_scale", _POINTER),
        ("num_groups", _INT),
        ("v_stride", _INT),
        ("slices", _INT),
        ("state", _POINTER),
        ("workers", _INT),
        ("by_slot", _INT),
        ("part_start", _INT * 2),
    ]


@dataclass(frozen=True, slots=True)
class FusedLoraWorkspace:
    """What launches on one stream share.

    Shapes: v [16, 64, rank_capacity] float32, parts of A x for slices of x's columns; row_scale [64] float32, factors
    of rows of v; state [2] int32, counters of GEMMs that shrink themselves, zero between launches. ``rank_capacity``:
    most ranks of a group, all its linears together.
    """

    v: Tensor
    row_scale: Tensor
    state: Tensor

    @classmethod
    def allocate(cls, *, rank_capacity: int, device: torch.device | str) -> FusedLoraWorkspace:
        shape = (MAX_SLICES, MAX_ROWS, -(-rank_capacity // 16) * 16)
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(MAX_ROWS, dtype=torch.float32, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class BatchAdapters:
    """The adapters of a batch's rows for one group of linears at one layer.

    Shapes: arena and rows as in ``lora_rows_ref``; table [slots, 8] int64 or, if ``gathered``, [G, 8]: group g's row of
    it, which saves the kernels one trip to memory. At most 64 groups.
    Raises: FusedLoraError.
    """

    arena: Tensor
    table: Tensor
    rows: RowGroups
    workspace: FusedLoraWorkspace
    gathered: bool = False

    def __post_init__(self) -> None:
        if self.table.stride(1) != 1 or self.rows.slots.shape[0] > MAX_ROWS:
            raise FusedLoraError(f"table rows must be contiguous, and groups at most {MAX_ROWS}")

    def arguments(
        self,
        num_columns: int,
        *,
        part_starts: tuple[int, int] = (0, 0),
        row_scale: Tensor | None = None,
        workers: int = 0,
    ) -> LoraArgs:
        """For a launch whose x has ``num_columns``.

        ``part_starts``: first output of the second and third linear. ``workers``: CTAs that shrink beside a GEMM.
        """
        return LoraArgs(
            arena=self.arena.data_ptr(),
            table=self.table.data_ptr(),
            slot_stride=self.table.stride(0) * self.table.element_size(),
            slots=self.rows.slots.data_ptr(),
            starts=self.rows.starts.data_ptr(),
            order=self.rows.order.data_ptr(),
            v=self.workspace.v.data_ptr(),
            row_scale=row_scale.data_ptr() if row_scale is not None else None,
            num_groups=self.rows.slots.shape[0],
            v_stride=self.workspace.v.shape[-1],
            slices=num_slices(num_columns),
            state=self.workspace.state.data_ptr(),
            workers=workers,
            by_slot=0 if self.gathered else 1,
            part_start=(ctypes.c_int * 2)(*part_starts),
        )


def num_slices(num_columns: int) -> int:
    """Slices of x's columns whose parts of v are added up: the same for every batch."""
    return min(MAX_SLICES, -(-num_columns // _SLICE_COLUMNS))
