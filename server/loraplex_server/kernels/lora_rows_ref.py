"""What adapter deltas of decode rows are, in plain torch, over the tables that the kernels read.

An adapter's factors for one group of linears at one layer lie in the arena as ``engine.adapter_image`` writes them: the
stacked A rows [R, K], then each present linear's B [N_p, R_p]. ``table`` says where, for every slot.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Linears in the largest group (q, k, v).
MAX_PARTS: Final = 3
# Columns of a table row: offset of A in the arena (elements), ranks in all, ranks of each linear, offset of the epilogue
# (0: none), padding.
TABLE_COLUMNS: Final = 8
EPILOGUE_COLUMN: Final = 5


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Decode rows by the adapter they use.

    Shapes: slots [G] int32: each group's slot, -1 past the last group; starts [G + 1] int32 and order [B] int32:
    group g's rows are order[starts[g]:starts[g + 1]]. Rows of the base are in no group.
    """

    slots: Tensor
    starts: Tensor
    order: Tensor


def lora_rows_ref(
    out: Tensor, x: Tensor, arena: Tensor, table: Tensor, rows: RowGroups, part_sizes: tuple[int, ...]
) -> None:
    """Add each row's adapter delta of one group of linears to ``out`` in place; defines ``lora_rows``.

    Shapes: out [B, N], x [B, K], arena [elements], table [slots, 8] int64 (columns above; rank 0: nothing to add),
    part_sizes: output columns of each linear of the group, N in all. The shrunk rows are rounded to the arena's dtype.
    """
    k_size = x.shape[1]
    for group, slot in enumerate(rows.slots.tolist()):
        if slot < 0:
            continue
        offset, total, *ranks = table[slot].tolist()[: 2 + len(part_sizes)]
        index = rows.order[rows.starts[group] : rows.starts[group + 1]].long()
        a = arena[offset : offset + total * k_size].view(total, k_size)
        shrunk = (x[index].float() @ a.float().t()).to(arena.dtype)
        cursor, column, rank_start = offset + total * k_size, 0, 0
        for size, rank in zip(part_sizes, ranks, strict=True):
            b = arena[cursor : cursor + size * rank].view(size, rank)
            delta = shrunk[:, rank_start : rank_start + rank].float() @ b.float().t()
            target = out[index, column : column + size].float() + delta
            out[index, column : column + size] = target.to(out.dtype)
            cursor, column, rank_start = cursor + size * rank, column + size, rank_start + rank


def group_rows(slots: list[int], capacity: int) -> tuple[list[int], list[int], list[int]]:
    """``RowGroups`` as lists (slots [capacity], starts [capacity + 1], order [capacity]) from each row's slot."""
    distinct = sorted({slot for slot in slots if slot >= 0})
    order = [row for slot in distinct for row, own in enumerate(slots) if own == slot]
    starts = [0]
    for slot in distinct:
        starts.append(starts[-1] + slots.count(slot))
    padding = capacity - len(distinct)
    return (
        distinct + [-1] * padding,
        starts + [starts[-1]] * padding,
        order + [0] * (capacity - len(order)),
    )


def empty_table(num_slots: int, device: torch.device) -> Tensor:
    """A table in which no slot adds anything."""
    return torch.zeros((num_slots, TABLE_COLUMNS), dtype=torch.int64, device=device)
