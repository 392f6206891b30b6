"""Adapters as the decode rows' kernels find them: device tables of where each slot's factors lie, and of which rows use
which slot."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from loraplex_adapters.base import BaseShape
from loraplex_server.engine.adapter_image import AdapterLayout, GroupPlace
from loraplex_server.kernels.lora import LoraWorkspace, lora_rows
from loraplex_server.kernels.lora_rows_ref import TABLE_COLUMNS, RowGroups, group_rows
from loraplex_server.kernels.nf4_lora import FusedLoraWorkspace, can_fuse, nf4_lora_linear
from loraplex_server.model.adapters import GROUPS
from loraplex_server.model.fused import Multiply
from loraplex_server.model.linear import GroupLinear, Nf4Linear

# Resident adapters that the tables have room for, and ranks of one group; others are served through the plain path.
MAX_SLOTS: Final = 1024
_RANK_CAPACITY: Final = 2048

_GROUP_INDEX: Final = {group: index for index, group in enumerate(GROUPS)}


class DeviceAdapters:
    """The tables of one engine. Owned by its thread; written on its stream, so that a step sees all of a change or none.

    Shapes: table [slots, layers, groups, 8] int64, see ``kernels.lora_rows_ref``.
    """

    def __init__(self, base: BaseShape, arena: Tensor, *, max_rows: int) -> None:
        device = arena.device
        self._base = base
        self._arena = arena
        self._table = torch.zeros(
            (MAX_SLOTS, base.num_layers, len(GROUPS), TABLE_COLUMNS), dtype=torch.int64, device=device
        )
        self._part_sizes = {group: tuple(base.linears[m][0] for m in members) for group, members in GROUPS.items()}
        self._workspace = LoraWorkspace.allocate(max_rows=max_rows, rank_capacity=_RANK_CAPACITY, device=device)
        self._fused = FusedLoraWorkspace.allocate(rank_capacity=_RANK_CAPACITY, device=device)
        self._fits: set[int] = set()

        def rows(size: int) -> Tensor:
            return torch.full((size,), -1, dtype=torch.int32, device=device)

        self._rows = RowGroups(rows(max_rows), rows(max_rows + 1), rows(max_rows))

    # --- where factors lie ------------------------------------------------------------------------------------------

    def place(self, slot: int, start: int, layout: AdapterLayout) -> None:
        """The adapter in ``slot`` lies at ``start`` (elements) of the arena from now on."""
        self._fits.discard(slot)
        if slot >= MAX_SLOTS or max(place.rank for place in layout.groups.values()) > _RANK_CAPACITY:
            return
        entries = torch.zeros(self._table.shape[1:], dtype=torch.int64)
        for (layer, group), place in layout.groups.items():
            entries[layer, _GROUP_INDEX[group], : 2 + len(GROUPS[group])] = self._entry(start, group, place)
        self._table[slot].copy_(entries)
        self._fits.add(slot)

    def forget(self, slot: int) -> None:
        """Nobody is in ``slot``: rows that still name it get nothing added."""
        if slot in self._fits:
            self._fits.discard(slot)
            self._table[slot].zero_()

    def fits(self, slot: int) -> bool:
        """Whether rows may use this slot."""
        return slot in self._fits

    def _entry(self, start: int, group: str, place: GroupPlace) -> Tensor:
        ranks, column = [], 0
        by_column = {part.col_start: part.rank for part in place.parts}
        for size in self._part_sizes[group]:
            ranks.append(by_column.get(column, 0))
            column += size
        return torch.tensor([start + place.offset, place.rank, *ranks])

    # --- which rows use them ----------------------------------------------------------------------------------------

    def seat(self, slots: Sequence[int], bucket: int) -> None:
        """These are the slots of the rows, in order, of steps that run in a bucket of this many rows."""
        groups = group_rows([*slots, *[-1] * (bucket - len(slots))], bucket)
        for target, values in zip((self._rows.slots, self._rows.starts, self._rows.order), groups, strict=True):
            target[: len(values)].copy_(torch.tensor(values, dtype=torch.int32))

    def for_bucket(self, bucket: int) -> Multiply:
        """What multiplies a bucket's rows by the base's weights and adds their adapters' deltas."""
        rows = RowGroups(self._rows.slots[:bucket], self._rows.starts[: bucket + 1], self._rows.order[:bucket])

        def multiply(weights: GroupLinear, x: Tensor, layer: int, group: str) -> Tensor:
            table = self._table[:, layer, _GROUP_INDEX[group]]
            if isinstance(weights, Nf4Linear) and (packed := weights.repacked) and can_fuse(packed, bucket):
                out = x.new_empty(bucket, packed.num_out)
                nf4_lora_linear(
                    x,
                    packed,
                    out,
                    arena=self._arena,
                    table=table,
                    rows=rows,
                    workspace=self._fused,
                    bias=weights.bias,
                )
                return out
            out = weights(x)
            lora_rows(out, x, self._arena, table, rows, self._part_sizes[group], self._workspace)
            return out

        return multiply
