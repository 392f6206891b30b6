"""What adapters cost beside the NF4 GEMMs of a decode step: everything that makes and multiplies the linears' inputs.

python -m benchmarks.lora --out DIR    every batch below, base and with rank-16 adapters on all linears
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import (
    LLAMA_8B,
    LLAMA_8B_PARTS,
    NUM_LAYERS,
    QWEN_1_5B,
    QWEN_1_5B_PARTS,
    Linears,
    row,
    time_graph,
    write,
)
from loraplex_server.kernels import nf4_cuda
from loraplex_server.kernels.activation import silu_mul
from loraplex_server.kernels.lora_args import BatchAdapters, FusedLoraWorkspace
from loraplex_server.kernels.lora_produce import Shrunk, add_norm_shrink, shrink, silu_mul_shrink
from loraplex_server.kernels.lora_rows_ref import RowGroups, group_rows
from loraplex_server.kernels.nf4_lora import nf4_lora_linear, shrinks_beside
from loraplex_server.kernels.norm import add_rms_norm

_EPS = 1e-5
BATCHES = ((1, 1), (8, 1), (8, 8), (16, 16), (32, 1), (32, 8), (32, 32), (64, 8), (64, 64))


class Step:
    """The linears of all layers and what makes their inputs, for ``m`` rows over ``count`` adapters."""

    def __init__(
        self, linears: Linears, parts: dict[str, tuple[int, ...]], ranks: Sequence[int], m: int, count: int
    ) -> None:
        self.linears, self.m = linears, m
        device = torch.device("cuda")
        found = group_rows([i % count for i in range(m)], m)
        self.rows = RowGroups(*(torch.tensor(values, dtype=torch.int32, device=device) for values in found))
        self.workspace = FusedLoraWorkspace.allocate(rank_capacity=3 * max(ranks), device=device)
        lengths = [self._length(parts, ranks[slot % len(ranks)]) for slot in range(count)]
        self.arena = torch.empty(sum(lengths) * len(linears.layers), dtype=torch.bfloat16, device=device)
        self.arena.normal_(0, 0.02)
        offset, self.tables = 0, []
        for _ in linears.layers:
            tables: dict[str, list[list[int]]] = {group: [] for group in parts}
            for slot in range(count):
                rank = ranks[slot % len(ranks)]
                for group, sizes in parts.items():
                    padding = [0] * (6 - len(sizes))
                    tables[group].append([offset, rank * len(sizes), *([rank] * len(sizes)), *padding])
                    offset += rank * (len(sizes) * linears.shapes[group][1] + sum(sizes))
            filled = {group: [*entries, *[entries[0]] * (m - count)] for group, entries in tables.items()}
            self.tables.append({g: torch.tensor(e, dtype=torch.int64, device=device) for g, e in filled.items()})
        hidden, inner = linears.shapes["qkv"][1], linears.shapes["down"][1]
        self.x = torch.randn(m, hidden, device=device).bfloat16()
        self.attended = torch.randn(m, linears.shapes["o"][1], device=device).bfloat16()
        self.gate_up = torch.randn(m, 2 * inner, device=device).bfloat16()
        self.residual = torch.randn(m, hidden, device=device).bfloat16()
        self.weight = torch.ones(hidden, device=device, dtype=torch.bfloat16)

    def _length(self, parts: dict[str, tuple[int, ...]], rank: int) -> int:
        return sum(rank * (len(sizes) * self.linears.shapes[g][1] + sum(sizes)) for g, sizes in parts.items())

    def launches(self, *, adapters: bool, only: str | None = None) -> list[Callable[[], None]]:
        one = self._with_adapters if adapters else self._base
        return [
            (lambda index=index, name=name: one(index, name))
            for index in range(len(self.linears.layers))
            for name in self.linears.shapes
            if only in (None, name)
        ]

    def _input(self, name: str) -> torch.Tensor:
        if name in ("qkv", "gate_up"):
            return add_rms_norm(self.x, self.residual, self.weight, _EPS)
        return silu_mul(self.gate_up) if name == "down" else self.attended

    def _base(self, index: int, name: str) -> None:
        weight = self.linears.layers[index][name]
        x = self._input(name)
        out = torch.empty(self.m, weight.num_out, dtype=x.dtype, device=x.device)
        nf4_cuda.gemm(x, weight, out, None, dependent=True)

    def _with_adapters(self, index: int, name: str) -> None:
        weight = self.linears.layers[index][name]
        adapters = BatchAdapters(self.arena, self.tables[index][name], self.rows, self.workspace, gathered=True)
        x: Shrunk | torch.Tensor
        if shrinks_beside(weight, self.m):
            x = self._input(name)
        elif name in ("qkv", "gate_up"):
            x, _ = add_norm_shrink(self.x, self.residual, self.weight, _EPS, adapters)
        else:
            x = silu_mul_shrink(self.gate_up, adapters) if name == "down" else shrink(self.attended, adapters)
        out = torch.empty(self.m, weight.num_out, dtype=self.x.dtype, device=self.x.device)
        nf4_lora_linear(x, weight, out, adapters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["8b", "1.5b"], default="8b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16], help="of the adapters, in turn")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    is_8b = options.model == "8b"
    parts = LLAMA_8B_PARTS if is_8b else QWEN_1_5B_PARTS
    shapes, num_layers = (LLAMA_8B, NUM_LAYERS) if is_8b else (QWEN_1_5B, 28)
    linears = Linears(shapes, num_layers)
    for layer in linears.layers:
        for name in shapes:
            layer[name] = replace(layer[name], part_rows=parts[name])
    table: list[dict[str, Any]] = []
    label = " and ".join(map(str, options.ranks))
    for m, count in BATCHES:
        step = Step(linears, parts, options.ranks, m, count)
        found = {}
        for adapters in (False, True):
            median, spread = time_graph(step.launches(adapters=adapters))
            what = f"{count} adapters of rank {label}" if adapters else f"base beside {count} adapters"
            table.append(row(options.model, what, m, "", median / 1e3, spread / 1e3, "ms", 0.0, 0.0))
            found[adapters] = median / 1e3
        each = {
            name: tuple(
                round(time_graph(step.launches(adapters=adapters, only=name))[0] / num_layers, 2)
                for adapters in (False, True)
            )
            for name in shapes
        }
        print(f"m={m} adapters={count}: base {found[False]:.3f} ms, with {found[True]:.3f} ms; us {each}", flush=True)
    write(options.out / f"kernels_lora_{options.model}.csv", table)


if __name__ == "__main__":
    main()
