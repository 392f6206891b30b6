"""Prompts on a GPU: the fused forward pass of any batch, with the adapters that its rows name."""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from loraplex_server.engine.device_adapters import RANK_CAPACITY, DeviceAdapters
from loraplex_server.kernels.lora_ref import lora_add_ref
from loraplex_server.kernels.lora_segments import RowTiles, SegmentWorkspace, cut_rows, lora_add, lora_silu_mul
from loraplex_server.model.adapters import AdapterLookup
from loraplex_server.model.batch import Batch, Segment, send
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.fused_prefill import FusedPrefill, PromptDeltas
from loraplex_server.model.kv_cache import KVCache


class PromptPath:
    """Runs batches of up to ``max_tokens`` rows. Owned by the engine's thread; everything runs on its current stream."""

    def __init__(
        self, decoder: Decoder, kv: KVCache, adapters: DeviceAdapters, lookup: AdapterLookup, *, max_tokens: int
    ) -> None:
        self._forward = FusedPrefill(decoder, kv, max_tokens=max_tokens)
        self._num_layers = decoder.spec.num_layers
        self._adapters = adapters
        self._lookup = lookup
        self._workspace = SegmentWorkspace.allocate(
            max_rows=max_tokens, rank_capacity=RANK_CAPACITY, dtype=decoder.dtype, device=decoder.device
        )

    def start(self, batch: Batch) -> "PromptPass":
        """Begin a pass; the one before has ended."""
        return PromptPass(self._forward, batch, self._deltas(batch) if batch.segments else None, self._num_layers)

    def _deltas(self, batch: Batch) -> PromptDeltas:
        tabled = [s for s in batch.segments if self._adapters.fits(s.slot)]
        others = tuple(s for s in batch.segments if not self._adapters.fits(s.slot))
        most_ranks = max((self._adapters.most_ranks(s.slot) for s in tabled), default=8)
        tiles = torch.tensor(cut_rows(((s.start, s.stop, s.slot) for s in tabled), batch.num_tokens), dtype=torch.int32)
        rows = RowTiles(send(tiles, batch.token_ids.device), most_ranks)
        return _BatchDeltas(self._adapters, self._lookup, rows, others, self._workspace)


class PromptPass:
    """One batch on its way through the layers."""

    def __init__(self, forward: FusedPrefill, batch: Batch, deltas: PromptDeltas | None, num_layers: int) -> None:
        self._forward = forward
        self._batch = batch
        self._deltas = deltas
        self._layers = iter(range(num_layers))
        self._x = forward.start(batch)

    def advance(self, num_layers: int) -> None:
        """Queue the next layers on the device, as many as there are."""
        for index in islice(self._layers, num_layers):
            self._x = self._forward.layer(index, self._batch, self._deltas)

    def finish(self) -> Tensor:
        """The rest of the layers: normed hidden states [T, H], which the next pass overwrites."""
        for index in self._layers:
            self._x = self._forward.layer(index, self._batch, self._deltas)
        return self._x


@dataclass(frozen=True, slots=True)
class _BatchDeltas:
    """See ``PromptDeltas``. ``others``: segments of adapters that the tables have no room for."""

    adapters: DeviceAdapters
    lookup: AdapterLookup
    rows: RowTiles
    others: tuple[Segment, ...]
    workspace: SegmentWorkspace

    def add(self, out: Tensor, x: Tensor, layer: int, group: str) -> None:
        lora_add(out, x, self.adapters.factors(layer, group), self.rows, self.workspace)
        self._add_others(out, x, layer, group)

    def silu_mul(self, gate_up: Tensor, x: Tensor, layer: int, out: Tensor) -> Tensor:
        self._add_others(gate_up, x, layer, "gate_up")
        factors = self.adapters.factors(layer, "gate_up")
        return lora_silu_mul(gate_up, x, factors, self.rows, self.workspace, out=out)

    def _add_others(self, out: Tensor, x: Tensor, layer: int, group: str) -> None:
        found = [(s.start, s.stop, self.lookup.delta(s.slot, layer, group)) for s in self.others]
        lora_add_ref(out, x, [(start, stop, delta) for start, stop, delta in found if delta is not None])
