"""Times of the GPU kernels, as CSV: every figure with the GPU, versions, median and spread.

python benchmarks/kernels.py nf4 --out DIR          the linears of an 8B Llama at the configured cuts
python benchmarks/kernels.py sweep --out DIR        other cuts of the same, to renew the table in nf4_config.py
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from loraplex_server.kernels import nf4_cuda, nvrtc, nvrtc_build
from loraplex_server.kernels.nf4_config import Config, MmaConfig, RingConfig, choose, token_tiles
from loraplex_server.kernels.nf4_layout import CODE_BYTES, UNIT_BYTES, RepackedNf4

LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
QWEN_1_5B = {"qkv": (2048, 1536), "o": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960)}
LLAMA_8B_PARTS = {"qkv": (4096, 1024, 1024), "o": (4096,), "gate_up": (14336, 14336), "down": (4096,)}
QWEN_1_5B_PARTS = {"qkv": (1536, 256, 256), "o": (1536,), "gate_up": (8960, 8960), "down": (1536,)}
NUM_LAYERS = 32
Launch = Callable[[], Any]


def random_repacked(n: int, k: int) -> RepackedNf4:
    """A matrix of random codes and scales near 0.05, made without quantizing anything."""
    row_blocks, k_blocks = -(-n // 64), k // 64
    data = torch.randint(0, 256, (row_blocks, k_blocks, UNIT_BYTES), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(row_blocks, k_blocks, 64, device="cuda") * 0.02 + 0.02).half()
    data[..., CODE_BYTES:] = scales.view(torch.uint8).view(row_blocks, k_blocks, 128)
    return RepackedNf4(data.view(-1), 1.0, k, (n,), ({},))


def time_graph(launches: Sequence[Launch], repeats: int = 7) -> tuple[float, float]:
    """Median and spread (largest - smallest) of one replay of all launches in a CUDA graph, in microseconds."""
    for launch in launches[:8]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for repeat in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times), max(times) - min(times)


def gemm_launch(
    x: torch.Tensor, weight: RepackedNf4, out: torch.Tensor, config: Config | None, dependent: bool = True
) -> Launch:
    """One fused GEMM as something to capture."""
    return lambda: nf4_cuda.gemm(x, weight, out, None, config=config, dependent=dependent)


class Linears:
    """Weights of every layer, so that a pass reads far more than the L2 cache holds."""

    def __init__(self, shapes: dict[str, tuple[int, int]], num_layers: int) -> None:
        self.shapes = shapes
        self.layers = [{name: random_repacked(n, k) for name, (n, k) in shapes.items()} for _ in range(num_layers)]

    def tensors(self, name: str, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        n, k = self.shapes[name]
        x = torch.randn(m, k, device="cuda").bfloat16()
        return x, torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")

    def time_shape(self, name: str, m: int, config: Config | None) -> tuple[float, float]:
        """Microseconds a launch of one linear over all layers."""
        x, out = self.tensors(name, m)
        median, spread = time_graph([gemm_launch(x, layer[name], out, config) for layer in self.layers])
        return median / len(self.layers), spread / len(self.layers)

    def time_all(self, m: int, configs: dict[str, Config | None], dependent: bool = True) -> tuple[float, float]:
        """Milliseconds of all linears of all layers in the model's order."""
        buffers = {name: self.tensors(name, m) for name in self.shapes}
        launches = [
            gemm_launch(buffers[name][0], layer[name], buffers[name][1], configs.get(name), dependent)
            for layer in self.layers
            for name in self.shapes
        ]
        median, spread = time_graph(launches)
        return median / 1e3, spread / 1e3

    def error(self, name: str, m: int, config: Config | None) -> float:
        """Relative error against float64 of one linear, from a poisoned output."""
        x, out = self.tensors(name, m)
        weight = self.layers[0][name]
        nf4_cuda.gemm(x, weight, out, None, config=config, dependent=True)
        expected = x.double() @ weight.dequantize(torch.float32).double().T
        return float((out.double() - expected).norm() / expected.norm())


def read_floor(linears: Linears) -> dict[str, float]:
    """Microseconds a launch that only reads each linear's bytes (torch's own reduction), as a yardstick."""
    floors = {}
    for name in linears.shapes:
        views = [layer[name].data.view(torch.int64) for layer in linears.layers]
        median, _ = time_graph([functools.partial(torch.sum, view) for view in views])
        floors[name] = median / len(views)
    return floors


def candidates(n: int, k: int, m: int, num_sms: int) -> Iterator[Config]:
    """Cuts worth trying for ``m`` rows."""
    row_blocks, k_blocks, rows = -(-n // 64), k // 64, -(-m // 8) * 8
    if m <= 16:
        for r, wk, cl, p, dx in itertools.product((1, 2, 4), (1, 2, 4, 7, 8, 14, 16), (1, 2), (2, 3, 4, 6), (0, 1)):
            for wr in (1, 2, 3, 4, 5, 6, 7, 8, 14, 16):
                mma = MmaConfig(r=r, wr=wr, wk=wk, cl=cl, p=p, dx=dx, xch=1 if dx else 4)
                warps, flight = wr * wk, r * wr * wk * p * 544
                if warps > 16 or warps < 6 or flight < 14000 or flight > 75000 or (wr > 4 and dx) or r * p > 12:
                    continue
                if k_blocks % (cl * wk) or mma.num_units(k_blocks) < p or (r == 4 and warps > 8):
                    continue
                if mma.valid(rows, row_blocks, k_blocks) and 0.8 < mma.grid(row_blocks) / num_sms <= 1:
                    yield mma
    if m <= 8:
        return
    warpgroups = ((4, 1), (3, 1), (2, 2), (1, 4), (1, 3), (2, 1), (1, 2))
    for (wr, wk), split, xc in itertools.product(warpgroups, (1, 2, 3, 4), (2, 3, 4, 6, 8)):
        for share in sorted({0, 1, wr}):
            for stages in (8, 6, 5, 4, 3, 2):
                ring = RingConfig(wr=wr, wk=wk, split=split, share=share, xc=xc, stages=stages)
                if ring.valid(rows, row_blocks, k_blocks, num_sms):
                    if 0.7 < ring.grid(row_blocks) / num_sms <= 1 and ring.part_blocks(k_blocks) >= 8:
                        yield ring
                    break  # the most stages that fit


def compile_all(work: Sequence[tuple[Config, int, int]]) -> None:
    """Build machine code for (configuration, tokens tiles, k blocks) on all cores, into the disk cache."""

    def one(item: tuple[Config, int, int]) -> None:
        config, tiles, k_blocks = item
        defines = {name.upper(): value for name, value in vars(config).items()}
        defines |= {"MT": tiles, "KB": k_blocks, "HALF": 0}
        nvrtc_build.build(
            "nf4_mma.cu" if isinstance(config, MmaConfig) else "nf4_ring.cu", defines, nvrtc.device_arch(0)
        )

    nvrtc_build.compiler_version()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, work))


def versions() -> dict[str, str]:
    """What a figure depends on."""
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "nvrtc": nvrtc_build.compiler_version()}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run_nf4(linears: Linears, label: str, out: Path) -> None:
    rows: list[dict[str, Any]] = []
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    sizes = (1, 4, 8, 16, 24, 32, 48, 64)
    plan = {(name, m): choose(n, k, m, num_sms, wgmma=True) for name, (n, k) in linears.shapes.items() for m in sizes}
    compile_all(
        [
            (config, token_tiles(m, wgmma=isinstance(config, RingConfig)), linears.shapes[name][1] // 64)
            for (name, m), config in plan.items()
        ]
    )
    floors = read_floor(linears)
    for m in sizes:
        for name in linears.shapes:
            median, spread = linears.time_shape(name, m, None)
            error = linears.error(name, m, None)
            rows.append(row(label, name, m, plan[name, m], median, spread, "us", floors[name], error))
        for dependent in (True, False):
            median, spread = linears.time_all(m, {}, dependent)
            what = "all layers" if dependent else "all layers, no dependent launch"
            rows.append(row(label, what, m, "", median, spread, "ms", sum(floors.values()) * NUM_LAYERS / 1e3, 0.0))
        print(label, m, *(f"{r['linear']}={r['median']}" for r in rows if r["m"] == m), flush=True)
    write(out / f"nf4_{label}.csv", rows)


def row(
    label: str, name: str, m: int, config: object, median: float, spread: float, unit: str, floor: float, error: float
) -> dict[str, Any]:
    return {
        "model": label,
        "linear": name,
        "m": m,
        "median": round(median, 3),
        "spread": round(spread, 3),
        "unit": unit,
        "read_only": round(floor, 3),
        "error": f"{error:.2e}",
        "config": str(config),
        **versions(),
    }


def run_sweep(linears: Linears, label: str, out: Path, sizes: Sequence[int]) -> None:
    rows: list[dict[str, Any]] = []
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    plan = {
        (name, m): [choose(n, k, m, num_sms, wgmma=True), *candidates(n, k, m, num_sms)]
        for name, (n, k) in linears.shapes.items()
        for m in sizes
    }
    print("candidates", {key: len(value) for key, value in plan.items()}, flush=True)
    compile_all(
        [
            (config, token_tiles(m, wgmma=isinstance(config, RingConfig)), linears.shapes[name][1] // 64)
            for (name, m), configs in plan.items()
            for config in configs
        ]
    )
    print("compiled", flush=True)
    best: dict[tuple[str, int], Config] = {}
    for (name, m), configs in plan.items():
        found = []
        for config in configs:
            error = linears.error(name, m, config)
            if not error < 3e-3:
                print("WRONG", name, m, config, error, flush=True)
                continue
            median, spread = linears.time_shape(name, m, config)
            found.append((median, config))
            rows.append(row(label, name, m, config, median, spread, "us", 0.0, error))
        found.sort(key=lambda item: item[0])
        best[name, m] = found[0][1]
        print(name, m, [f"{t:.2f} {c}" for t, c in found[:3]], f"first {rows and found[-1][0]:.1f}", flush=True)
        write(out / f"nf4_sweep_{label}.csv", rows)
    for m in sizes:
        median, spread = linears.time_all(m, {name: best[name, m] for name in linears.shapes})
        print(f"best of each, m={m}: {median:.3f} ms (spread {spread:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["nf4", "sweep"], nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--m", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--model", choices=["8b", "1.5b"], default="8b")
    args = parser.parse_args()
    torch.manual_seed(0)
    shapes, layers = (LLAMA_8B, NUM_LAYERS) if args.model == "8b" else (QWEN_1_5B, 28 * 4)
    linears = Linears(shapes, layers)
    if "nf4" in args.what:
        run_nf4(linears, args.model, args.out)
    if "sweep" in args.what:
        run_sweep(linears, args.model, args.out, args.m)


if __name__ == "__main__":
    main()
