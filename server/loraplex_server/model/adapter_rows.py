"""Decode rows with adapters on a GPU: with many rows what makes a group's input also shrinks it; the GEMM expands."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraplex_server.kernels.activation import silu_mul
from loraplex_server.kernels.lora import LoraWorkspace, lora_rows
from loraplex_server.kernels.lora_args import BatchAdapters, FusedLoraWorkspace
from loraplex_server.kernels.lora_produce import Shrunk, add_norm_shrink, shrink, silu_mul_shrink
from loraplex_server.kernels.lora_rows_ref import RowGroups
from loraplex_server.kernels.nf4_layout import RepackedNf4
from loraplex_server.kernels.nf4_lora import can_fuse, nf4_lora_linear, shrinks_beside
from loraplex_server.kernels.norm import add_rms_norm, rms_norm
from loraplex_server.model.adapters import GROUPS
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.fused import Input, Plain, Target
from loraplex_server.model.linear import Nf4Linear

_GROUP_INDEX = {group: index for index, group in enumerate(GROUPS)}


@dataclass(frozen=True, slots=True)
class AdapterTables:
    """Where a batch's adapters lie. Shapes: table [slots, layers, groups, 8] int64; gathered [layers, groups, G, 8]
    int64, the rows of ``table`` that the batch's groups of rows use; see ``lora_rows_ref``."""

    arena: Tensor
    table: Tensor
    gathered: Tensor
    part_sizes: Mapping[str, tuple[int, ...]]


def fuses(decoder: Decoder) -> bool:
    """Whether every linear of a model takes its adapters in the GEMM's own launch, for the rows that it takes at all."""
    linears = (group for layer in decoder.layers for group in (layer.qkv, layer.o, layer.gate_up, layer.down))
    return all(isinstance(one, Nf4Linear) and one.repacked is not None and can_fuse(one.repacked, 1) for one in linears)


class AdapterRows:
    """``Linears`` of one size of batch: the base's, and every row's adapter delta.

    Where the fused kernels do not run, a group is multiplied and then added to: batches that have such a group hold no
    adapter with an epilogue.
    """

    def __init__(
        self, tables: AdapterTables, rows: RowGroups, fused: FusedLoraWorkspace, separate: LoraWorkspace
    ) -> None:
        self._tables = tables
        self._rows = rows
        self._fused = fused
        self._separate = separate
        self._num_rows = rows.slots.shape[0]

    def norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, target: Target
    ) -> tuple[Input, Tensor]:
        if self._produces(target):
            return add_norm_shrink(x, residual, weight, eps, self._adapters(target))
        if residual is None:
            return Plain(rms_norm(x, weight, eps)), x
        return Plain(add_rms_norm(x, residual, weight, eps)), residual

    def gated(self, gate_up: Tensor, target: Target) -> Input:
        return silu_mul_shrink(gate_up, self._adapters(target)) if self._produces(target) else Plain(silu_mul(gate_up))

    def attended(self, x: Tensor, target: Target) -> Input:
        return shrink(x, self._adapters(target)) if self._produces(target) else Plain(x)

    def multiply(self, given: Input, target: Target) -> Tensor:
        weights = target.weights
        if (packed := self._packed(target)) is not None:
            assert isinstance(weights, Nf4Linear)
            out = given.x.new_empty(self._num_rows, packed.num_out)
            x = given if isinstance(given, Shrunk) else given.x
            nf4_lora_linear(x, packed, out, self._adapters(target), bias=weights.bias)
            return out
        out = weights(given.x)
        tables, index = self._tables, _GROUP_INDEX[target.group]
        table, sizes = tables.table[:, target.layer, index], tables.part_sizes[target.group]
        lora_rows(out, given.x, tables.arena, table, self._rows, sizes, self._separate)
        return out

    def _packed(self, target: Target) -> RepackedNf4 | None:
        """The weights, if their GEMM takes adapters."""
        packed = target.weights.repacked if isinstance(target.weights, Nf4Linear) else None
        return packed if packed is not None and can_fuse(packed, self._num_rows) else None

    def _produces(self, target: Target) -> bool:
        """Whether what makes the target's input also shrinks it."""
        packed = self._packed(target)
        return packed is not None and not shrinks_beside(packed, self._num_rows)

    def _adapters(self, target: Target) -> BatchAdapters:
        table = self._tables.gathered[target.layer, _GROUP_INDEX[target.group]]
        return BatchAdapters(self._tables.arena, table, self._rows, self._fused, gathered=True)
