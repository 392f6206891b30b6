"""LoRA fused into the NF4 GEMM, against float64 of the dequantized weights and the adapters' factors."""

import pytest
import torch

from loraplex_server.kernels import nf4_cuda
from loraplex_server.kernels.activation_ref import silu_mul_ref
from loraplex_server.kernels.lora_args import BatchAdapters, FusedLoraWorkspace
from loraplex_server.kernels.lora_produce import add_norm_shrink, silu_mul_shrink
from loraplex_server.kernels.lora_rows_ref import EPILOGUE_COLUMN, RowGroups, empty_table, group_rows
from loraplex_server.kernels.nf4 import Nf4Weight, RepackedNf4, repack
from loraplex_server.kernels.nf4_lora import can_fuse, nf4_lora_linear
from loraplex_server.kernels.norm_ref import rms_norm_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and nf4_cuda.supported(0)), reason="needs a Hopper GPU or newer, and NVRTC"
    ),
]

TOLERANCE = {torch.bfloat16: 2.6e-3, torch.float16: 1.2e-3}
K = 1024
PARTS = {"qkv": (512, 144, 128), "o": (1040,), "gate_up": (2048, 2048)}
Ranks = tuple[int, ...]


def random_weight(n: int, k: int, seed: int) -> Nf4Weight:
    generator = torch.Generator("cuda").manual_seed(seed)
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda", generator=generator)
    absmax = torch.rand(n * k // 64, device="cuda", generator=generator) * 0.05 + 0.01
    return Nf4Weight(packed=packed, shape=(n, k), absmax=absmax)


class Bench:
    """One layer's weights and adapters for a group, and what the fused kernel makes of them."""

    def __init__(self, group: str, adapters: list[Ranks], dtype: torch.dtype = torch.bfloat16, k: int = K) -> None:
        self.sizes, self.k, self.dtype = PARTS[group], k, dtype
        self.parts = [random_weight(n, k, seed) for seed, n in enumerate(self.sizes)]
        self.weight: RepackedNf4 = repack(self.parts)
        self.dense = torch.cat([part.dequantize(torch.float32) for part in self.parts]).double()
        lengths = [sum(ranks) * k + sum(n * r for n, r in zip(self.sizes, ranks, strict=True)) for ranks in adapters]
        generator = torch.Generator("cuda").manual_seed(3)
        values = torch.randn(64 + sum(lengths), device="cuda", generator=generator)
        self.arena = (values * 0.17).to(dtype)  # products about as large as the base's weights
        self.table = empty_table(len(adapters), torch.device("cuda"))
        self.factors = []
        offset = 64
        for slot, (ranks, length) in enumerate(zip(adapters, lengths, strict=True)):
            self.table[slot, : 2 + len(ranks)] = torch.tensor([offset, sum(ranks), *ranks])
            self.factors.append(self.split(self.arena[offset : offset + length].double(), ranks))
            offset += length
        self.workspace = FusedLoraWorkspace.allocate(rank_capacity=768, device="cuda")

    def split(self, image: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, list[torch.Tensor]]:
        sizes = [sum(ranks) * self.k, *(n * r for n, r in zip(self.sizes, ranks, strict=True))]
        a, *b = image.split(sizes)
        return a.view(sum(ranks), self.k), [f.view(n, r) for f, n, r in zip(b, self.sizes, ranks, strict=True)]

    def inputs(self, m: int, seed: int = 7) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(m, self.k, device="cuda", generator=generator).to(self.dtype)

    def launch(self, x: torch.Tensor, out: torch.Tensor, rows: RowGroups) -> None:
        nf4_lora_linear(x, self.weight, out, self.adapters(rows))

    def adapters(self, rows: RowGroups, *, gathered: bool = False) -> BatchAdapters:
        table = self.table[rows.slots.clamp(min=0)] if gathered else self.table
        return BatchAdapters(self.arena, table, rows, self.workspace, gathered)

    def run(self, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        out = torch.full((x.shape[0], self.weight.num_out), float("nan"), dtype=x.dtype, device="cuda")
        rows = row_groups(slots)
        torch.cuda.synchronize()
        self.launch(x, out, rows)
        return out

    def expected(self, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        expected = x.double() @ self.dense.T
        for row, slot in enumerate(slots):
            if slot >= 0:
                a, factors = self.factors[slot]
                v = torch.split(a @ x[row].double(), [b.shape[1] for b in factors])
                expected[row] += torch.cat([b @ part for b, part in zip(factors, v, strict=True)])
        return expected

    def error(self, out: torch.Tensor, x: torch.Tensor, slots: list[int]) -> float:
        expected = self.expected(x, slots)
        return float((out.double() - expected).norm() / expected.norm())

    def check(self, slots: list[int]) -> None:
        x = self.inputs(len(slots))
        out = self.run(x, slots)
        assert self.error(out, x, slots) < TOLERANCE[self.dtype]
        for _ in range(3):
            assert torch.equal(self.run(x, slots), out)
        assert not self.workspace.state.any()


def row_groups(slots: list[int]) -> RowGroups:
    return RowGroups(*(torch.tensor(v, dtype=torch.int32, device="cuda") for v in group_rows(slots, len(slots))))


def distributions(m: int, num_adapters: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(m)
    mixed = torch.randint(-1, num_adapters, (m,), generator=generator).tolist()
    return {
        "one": [0] * m,
        "base": [-1] * m,
        "distinct": [i % num_adapters for i in range(m)],
        "mixed": mixed,
        "sorted": sorted(mixed),
        "last row": [-1] * (m - 1) + [num_adapters - 1],
    }


@pytest.mark.parametrize("m", [1, 3, 8, 16, 21, 32, 48, 64])
@pytest.mark.parametrize("group", list(PARTS))
def test_rank_16_in_every_distribution(m: int, group: str) -> None:
    bench = Bench(group, [(16,) * len(PARTS[group])] * 64)
    for slots in distributions(m, 64).values():
        bench.check(slots)


@pytest.mark.parametrize("m", [17, 24, 33, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_residual", [True, False])
def test_a_norm_is_made_and_shrunk_in_one_launch(m: int, dtype: torch.dtype, has_residual: bool) -> None:
    bench = Bench("qkv", [(16, 16, 16), (8, 0, 24), (0, 0, 0), (64, 64, 64)], dtype)
    given, residual, weight = (40 * bench.inputs(m, seed=1)), 9 * bench.inputs(m, seed=2), bench.inputs(1, seed=3)[0]
    for slots in distributions(m, 4).values():
        rows, out = row_groups(slots), torch.empty(m, bench.weight.num_out, dtype=dtype, device="cuda")
        adapters = bench.adapters(rows, gathered=True)
        shrunk, total = add_norm_shrink(given, residual if has_residual else None, weight, 1e-5, adapters)
        nf4_lora_linear(shrunk, bench.weight, out, adapters)
        assert torch.equal(total, (given + residual) if has_residual else given)
        expected = rms_norm_ref(total, weight, 1e-5)
        torch.testing.assert_close(shrunk.x, expected, rtol=2e-2, atol=1e-2)
        assert bench.error(out, shrunk.x, slots) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("m", [17, 24, 33, 64])
def test_an_activation_is_made_and_shrunk_in_one_launch(m: int) -> None:
    bench = Bench("o", [(16,), (8,), (0,), (256,)], k=2112)
    gate_up = torch.cat([bench.inputs(m, seed=1), bench.inputs(m, seed=2)], dim=1)
    for slots in distributions(m, 4).values():
        rows, out = row_groups(slots), torch.empty(m, bench.weight.num_out, dtype=bench.dtype, device="cuda")
        adapters = bench.adapters(rows, gathered=True)
        shrunk = silu_mul_shrink(gate_up, adapters)
        nf4_lora_linear(shrunk, bench.weight, out, adapters)
        torch.testing.assert_close(shrunk.x, silu_mul_ref(gate_up), rtol=2e-2, atol=1e-2)
        assert bench.error(out, shrunk.x, slots) < TOLERANCE[bench.dtype]


@pytest.mark.parametrize("m", [1, 8, 24, 64])
def test_an_epilogue_scales_and_shifts_the_finished_output_of_its_adapter_alone(m: int) -> None:
    bench = Bench("qkv", [(16, 16, 16), (0, 0, 0), (8, 0, 24)])
    n, generator = bench.weight.num_out, torch.Generator("cuda").manual_seed(5)
    epilogues = torch.rand(2, 2, n, device="cuda", generator=generator) + 0.5  # of adapters 0 and 1
    start = -(-bench.arena.numel() // 8) * 8
    room = torch.zeros(start + 8 * n, dtype=bench.dtype, device="cuda")
    room[: bench.arena.numel()] = bench.arena
    room[start:].view(torch.float32).copy_(epilogues.flatten())
    bench.arena = room
    bench.table[:2, EPILOGUE_COLUMN] = torch.tensor([start, start + 4 * n])
    bias = bench.inputs(1, seed=11)[0, :1].expand(n).contiguous()
    for slots in distributions(m, 3).values():
        x, out = bench.inputs(m), torch.empty(m, n, dtype=bench.dtype, device="cuda")
        nf4_lora_linear(x, bench.weight, out, bench.adapters(row_groups(slots)), bias=bias)
        plain = bench.expected(x, slots) + bias.double()
        for row, slot in enumerate(slots):
            if slot in (0, 1):
                plain[row] = epilogues[slot, 0].double() * plain[row] + epilogues[slot, 1].double()
        assert float((out.double() - plain).norm() / plain.norm()) < TOLERANCE[bench.dtype]


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    bench = Bench("gate_up", [(16, 16)] * 8)
    x = bench.inputs(8)
    together = bench.run(x, list(range(8)))
    others = bench.run(x, [0, -1, 0, 3, 3, 3, -1, 7])
    assert torch.equal(together[[0, 3, 7]], others[[0, 3, 7]])


@pytest.mark.parametrize("m", [2, 11, 32, 64])
def test_mixed_ranks_and_absent_parts(m: int) -> None:
    ranks: list[Ranks] = [(8, 8, 8), (256, 256, 256), (16, 0, 16), (0, 24, 0), (0, 0, 0), (64, 8, 128), (0, 0, 40)]
    bench = Bench("qkv", ranks)
    for slots in distributions(m, len(ranks)).values():
        bench.check(slots)


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("k", [64, 192, 2112])
def test_other_widths_and_float16(m: int, k: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        bench = Bench("gate_up", [(16, 16), (8, 32), (0, 8)], dtype, k)
        for slots in distributions(m, 3).values():
            bench.check(slots)


@pytest.mark.parametrize("m", [8, 32])
def test_a_graph_serves_other_and_more_adapters_than_at_capture(m: int) -> None:
    bench = Bench("qkv", [(16, 16, 16)] * 32)
    rows, x = row_groups([-1] * m), bench.inputs(m)
    bench.run(x, [-1] * m)
    out = torch.empty(m, bench.weight.num_out, dtype=x.dtype, device="cuda")
    scale = torch.ones((), dtype=x.dtype, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scaled = x * scale
        for _ in range(3):
            bench.launch(scaled, out, rows)
    for chosen in distributions(m, 32).values():
        for captured, now in zip((rows.slots, rows.starts, rows.order), group_rows(chosen, m), strict=True):
            captured.copy_(torch.tensor(now, dtype=torch.int32))
        x.copy_(bench.inputs(m, seed=sum(chosen) + 50))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert bench.error(out, x, chosen) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("m", [24, 64])
def test_a_batch_without_adapters_waits_for_what_writes_its_input(m: int) -> None:
    bench, slow = Bench("o", [(16,)]), repack([random_weight(K, 16384, 1)])
    given = torch.randn(m, 16384, device="cuda").bfloat16()
    x, rows = torch.empty(m, K, dtype=torch.bfloat16, device="cuda"), row_groups([-1] * m)
    out = torch.empty(m, bench.weight.num_out, dtype=torch.bfloat16, device="cuda")

    def both() -> None:
        nf4_cuda.gemm(given, slow, x, None, dependent=True)
        bench.launch(x, out, rows)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    for tensor in (x, out):
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert bench.error(out, x, [-1] * m) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("m", [7, 30])
def test_rows_of_the_base_are_untouched_by_others(m: int) -> None:
    bench = Bench("o", [(16,), (8,), (64,)])
    slots = distributions(m, 3)["mixed"]
    x = bench.inputs(m)
    together, base = bench.run(x, slots), bench.run(x, [-1] * m)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(together[row], base[row])


def test_what_cannot_be_fused_is_named() -> None:
    assert can_fuse(repack([random_weight(64, 128, 0)]), 64)
    assert not can_fuse(repack([random_weight(64, 128, 0)]), 65)
    assert not can_fuse(repack([random_weight(n, 128, n) for n in (40, 24)]), 4)
