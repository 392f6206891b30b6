"""Runs a decoder on plain lists of tokens, and reads peft adapters in the simplest way."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from loraplex_adapters.base import module_path
from loraplex_server.kernels.lora_ref import GroupDelta, PartDelta
from loraplex_server.model.adapters import GROUPS, AdapterLookup, NoAdapters, OutsideParts
from loraplex_server.model.batch import Batch, Segment
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.kv_cache import KVCache
from loraplex_server.model.spec import ModelSpec

BLOCK_SIZE = 8


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Rows:
    """Tokens ``[start, stop)`` of a sequence, as one part of a batch."""

    name: str
    tokens: Sequence[int]
    start: int
    stop: int
    slot: int = -1


@dataclass
class Pages:
    """A KV cache of ``num_blocks`` blocks, dealt out to named sequences in a shuffled order."""

    decoder: Decoder
    num_blocks: int = 128
    tables: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.decoder.spec
        self.kv = KVCache.allocate(
            num_layers=spec.num_layers,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
        )
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(1))
        self.free: list[int] = order.tolist()

    def batch(self, parts: Sequence[Rows]) -> Batch:
        positions = [list(range(part.start, part.stop)) for part in parts]
        for part in parts:
            table = self.tables.setdefault(part.name, [])
            while len(table) * BLOCK_SIZE < part.stop:
                table.append(self.free.pop())
        lens = [part.stop - part.start for part in parts]
        starts = [sum(lens[:i]) for i in range(len(lens) + 1)]
        width = max(len(self.tables[part.name]) for part in parts)
        slots = [
            self.tables[part.name][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for part, places in zip(parts, positions, strict=True)
            for p in places
        ]
        tables = [self.tables[part.name] + [0] * (width - len(self.tables[part.name])) for part in parts]
        device = self.decoder.device
        return Batch(
            token_ids=torch.tensor([t for part in parts for t in part.tokens[part.start : part.stop]], device=device),
            positions=torch.tensor([p for places in positions for p in places], device=device),
            kv_slots=torch.tensor(slots, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            kv_lens=torch.tensor([part.stop for part in parts], dtype=torch.int32, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            token_adapters=torch.tensor(
                [part.slot for part, n in zip(parts, lens, strict=True) for _ in range(n)],
                dtype=torch.int32,
                device=device,
            ),
            logit_rows=torch.arange(starts[-1], device=device),
            query_lens=tuple(lens),
            prefix_and_query_lens=tuple(part.stop for part in parts),
            segments=tuple(
                Segment(part.slot, start, start + n)
                for part, start, n in zip(parts, starts, lens, strict=False)
                if part.slot >= 0
            ),
        )

    def logits(self, parts: Sequence[Rows], adapters: AdapterLookup | None = None) -> list[Tensor]:
        """Logits of every row, one tensor [rows, V] for each part."""
        batch = self.batch(parts)
        hidden = self.decoder.forward(batch, self.kv, adapters or NoAdapters())
        return list(self.decoder.logits(hidden).split(batch.query_lens))


def run_alone(decoder: Decoder, tokens: Sequence[int], slot: int = -1, adapters: AdapterLookup | None = None) -> Tensor:
    """Logits [T, V] of one sequence computed whole, in a cache of its own."""
    return Pages(decoder).logits([Rows("alone", tokens, 0, len(tokens), slot)], adapters)[0]


def transformers_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return logits


class PeftFolders:
    """An adapter lookup over peft folders: slot i is the i-th folder. Knows alpha / r and nothing more."""

    def __init__(self, spec: ModelSpec, folders: Sequence[Path], dtype: torch.dtype = torch.float32) -> None:
        self._spec = spec
        self._tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
        self._scales = [config["lora_alpha"] / config["r"] for config in configs]
        self._dtype = dtype

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        factors, parts, column, rank = [], [], 0, 0
        for linear in GROUPS[group]:
            width = self._spec.linears[linear][0]
            prefix = f"base_model.model.{module_path(layer, linear)}.lora_"
            a = self._tensors[slot].get(prefix + "A.weight")
            if a is not None:
                b = (self._tensors[slot][prefix + "B.weight"] * self._scales[slot]).to(self._dtype)
                parts.append(PartDelta(column, column + width, rank, rank + a.shape[0], b))
                factors.append(a.to(self._dtype))
                rank += a.shape[0]
            column += width
        return GroupDelta(torch.cat(factors), tuple(parts)) if parts else None

    def outside(self, slot: int) -> OutsideParts | None:
        return None
