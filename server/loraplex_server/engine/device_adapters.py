"""Adapters as the kernels find them: device tables of where each slot's factors lie, and of which rows use
which slot."""

from collections.abc import Sequence
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.adapter_image import AdapterLayout, GroupPlace
from loraplex_server.kernels.lora import LoraWorkspace
from loraplex_server.kernels.lora_args import FusedLoraWorkspace
from loraplex_server.kernels.lora_rows_ref import EPILOGUE_COLUMN, TABLE_COLUMNS, RowGroups, group_rows
from loraplex_server.kernels.lora_segments import GroupFactors
from loraplex_server.kernels.nf4_config import MAX_ROWS
from loraplex_server.model.adapter_rows import AdapterRows, AdapterTables
from loraplex_server.model.adapters import GROUPS
from loraplex_server.model.fused import Linears

# Resident adapters that the tables have room for, and ranks of one group; others are served through the plain path.
MAX_SLOTS: Final = 1024
RANK_CAPACITY: Final = 2048

_GROUP_INDEX: Final = {group: index for index, group in enumerate(GROUPS)}


class _Columns(NamedTuple):
    """A layout's part of the table: offsets from the adapter's first element, and where that is to be added."""

    relative: Tensor
    is_start: Tensor


class DeviceAdapters:
    """The tables of one engine. Owned by its thread; written on its stream, so that a step sees all of a change or none.

    Shapes: table [slots, layers, groups, 8] int64, see ``kernels.lora_rows_ref``.
    """

    def __init__(self, base: BaseShape, arena: Tensor, *, max_rows: int, fuses: bool) -> None:
        device = arena.device
        self._base = base
        self._arena = arena
        self._table = torch.zeros(
            (MAX_SLOTS, base.num_layers, len(GROUPS), TABLE_COLUMNS), dtype=torch.int64, device=device
        )
        self._part_sizes = {group: tuple(base.linears[m][0] for m in members) for group, members in GROUPS.items()}
        self._workspace = LoraWorkspace.allocate(max_rows=max_rows, rank_capacity=RANK_CAPACITY, device=device)
        self._fused = FusedLoraWorkspace.allocate(rank_capacity=RANK_CAPACITY, device=device)
        self._fuses = fuses
        self._most_ranks: dict[int, int] = {}
        self._with_epilogue: set[int] = set()
        self._columns: WeakKeyDictionary[AdapterLayout, _Columns] = WeakKeyDictionary()

        def rows(size: int) -> Tensor:
            return torch.full((size,), -1, dtype=torch.int32, device=device)

        self._rows = RowGroups(rows(max_rows), rows(max_rows + 1), rows(max_rows))
        fused_rows = min(max_rows, MAX_ROWS)
        self._chosen = self._table.new_zeros(fused_rows, *self._table.shape[1:])
        self._gathered = self._chosen.permute(1, 2, 0, 3).contiguous()

    # --- where factors lie ------------------------------------------------------------------------------------------

    def place(self, slot: int, start: int, layout: AdapterLayout) -> None:
        """The adapter in ``slot`` lies at ``start`` (elements) of the arena from now on."""
        self._most_ranks.pop(slot, None)
        self._with_epilogue.discard(slot)
        if layout.outside is not None:
            return
        most_ranks = max(place.rank for place in layout.groups.values())
        if slot >= MAX_SLOTS or most_ranks > RANK_CAPACITY:
            return
        columns = self._columns_of(layout)
        # From pinned memory in the stream's order: the step that is under way is not waited for.
        entries = columns.relative + columns.is_start * start
        staged = entries.pin_memory() if self._table.is_cuda else entries
        self._table[slot].copy_(staged, non_blocking=True)
        self._most_ranks[slot] = most_ranks
        if layout.has_epilogues:
            self._with_epilogue.add(slot)
        self._gather()

    def forget(self, slot: int) -> None:
        """Nobody is in ``slot``: rows that still name it get nothing added."""
        self._with_epilogue.discard(slot)
        if self._most_ranks.pop(slot, None) is not None:
            self._table[slot].zero_()
            self._gather()

    def fits(self, slot: int) -> bool:
        """Whether the kernels for any number of rows serve this slot: all that it adds is B A x."""
        return slot in self._most_ranks and slot not in self._with_epilogue

    def fits_rows(self, slot: int, num_rows: int) -> bool:
        """Whether decode rows of a batch of this size may use this slot."""
        fused = self._fuses and num_rows <= MAX_ROWS
        return slot in self._most_ranks and (fused or slot not in self._with_epilogue)

    def most_ranks(self, slot: int) -> int:
        """Ranks of the widest group of linears of the adapter in this slot, all its linears together."""
        return self._most_ranks[slot]

    def factors(self, layer: int, group: str) -> GroupFactors:
        """Where the kernels find every slot's factors for one group at one layer."""
        return GroupFactors(self._arena, self._table[:, layer, _GROUP_INDEX[group]], self._part_sizes[group])

    def _columns_of(self, layout: AdapterLayout) -> "_Columns":
        """Worked out once for all adapters of one layout."""
        found = self._columns.get(layout)
        if found is None:
            relative = torch.zeros(self._table.shape[1:], dtype=torch.int64)
            is_start = torch.zeros_like(relative)
            for (layer, group), place in layout.groups.items():
                index = _GROUP_INDEX[group]
                relative[layer, index, : 2 + len(GROUPS[group])] = self._entry(group, place)
                is_start[layer, index, 0] = 1
                if place.epilogue is not None:
                    relative[layer, index, EPILOGUE_COLUMN] = place.epilogue
                    is_start[layer, index, EPILOGUE_COLUMN] = 1
            found = self._columns[layout] = _Columns(relative, is_start)
        return found

    def _entry(self, group: str, place: GroupPlace) -> Tensor:
        ranks, column = [], 0
        by_column = {part.col_start: part.rank for part in place.parts}
        for size in self._part_sizes[group]:
            ranks.append(by_column.get(column, 0))
            column += size
        return torch.tensor([place.offset, place.rank, *ranks])

    # --- which rows use them ----------------------------------------------------------------------------------------

    def seat(self, slots: Sequence[int], bucket: int) -> None:
        """These are the slots of the rows, in order, of steps that run in a bucket of this many rows."""
        groups = group_rows([*slots, *[-1] * (bucket - len(slots))], bucket)
        for target, values in zip((self._rows.slots, self._rows.starts, self._rows.order), groups, strict=True):
            target[: len(values)].copy_(torch.tensor(values, dtype=torch.int32))
        self._gather()

    def for_bucket(self, bucket: int) -> Linears:
        """What multiplies a bucket's rows by the base's weights and adds their adapters' deltas."""
        rows = RowGroups(self._rows.slots[:bucket], self._rows.starts[: bucket + 1], self._rows.order[:bucket])
        tables = AdapterTables(self._arena, self._table, self._gathered, self._part_sizes)
        return AdapterRows(tables, rows, self._fused, self._workspace)

    def _gather(self) -> None:
        """Bring the seated rows' part of the table to where the fused kernels read it without looking slots up."""
        torch.index_select(self._table, 0, self._rows.slots[: self._chosen.shape[0]].clamp(min=0), out=self._chosen)
        self._gathered.copy_(self._chosen.permute(1, 2, 0, 3))
