"""The fused NF4 kernels on a GPU, against float64 of the dequantized weights."""

from dataclasses import replace

import pytest
import torch

from loraplex_server.kernels import nf4_cuda
from loraplex_server.kernels.nf4 import Nf4Gemm, Nf4Weight, nf4_linear, repack
from loraplex_server.kernels.nf4_config import Config, MmaConfig, RingConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and nf4_cuda.supported(0)), reason="needs a Hopper GPU or newer, and NVRTC"
    ),
]

# Relative error of the whole result; bfloat16 output rounding alone is 1.7e-3.
TOLERANCE = {torch.bfloat16: 2.6e-3, torch.float16: 1.2e-3}


def random_weight(n: int, k: int, seed: int = 0) -> Nf4Weight:
    """Random codes and absmax in bitsandbytes' double-quantized form."""
    generator = torch.Generator("cuda").manual_seed(seed)
    blocks = n * k // 64

    def codes(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda", generator=generator)

    return Nf4Weight(
        packed=codes(n * k // 2),
        shape=(n, k),
        absmax_codes=codes(blocks),
        nested_absmax=torch.rand(-(-blocks // 256), device="cuda", generator=generator) * 0.01,
        nested_code=torch.linspace(-1, 1, 256, device="cuda"),
        offset=torch.tensor(0.05, device="cuda"),
    )


def activations(m: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(m, k, device="cuda", generator=generator).to(dtype)


def relative_error(out: torch.Tensor, x: torch.Tensor, *parts: Nf4Weight) -> float:
    dense = torch.cat([part.dequantize(torch.float32) for part in parts]).double()
    expected = x.double() @ dense.T
    return float((out.double() - expected).norm() / expected.norm())


def run(x: torch.Tensor, parts: list[Nf4Weight], config: Config | None = None) -> torch.Tensor:
    weight = repack(parts)
    out = torch.full((x.shape[0], weight.num_out), float("nan"), dtype=x.dtype, device="cuda")
    torch.cuda.synchronize()
    if config is None:
        return nf4_linear(x, weight, out)
    nf4_cuda.gemm(x, weight, out, None, config=config, dependent=True)
    return out


@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 32, 33, 48, 63, 64, 65, 130])
@pytest.mark.parametrize("shape", [(6144, 4096), (1536, 8960), (200, 192)])
def test_every_row_count(m: int, shape: tuple[int, int]) -> None:
    weight, x = random_weight(*shape), activations(m, shape[1])
    assert relative_error(run(x, [weight]), x, weight) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("m", [1, 12, 40, 200])
@pytest.mark.parametrize("shape", [(1, 64), (8, 64), (17, 128), (100, 320), (333, 2112), (4608, 3584), (2048, 1536)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_odd_shapes(m: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = random_weight(*shape), activations(m, shape[1], dtype)
    assert relative_error(run(x, [weight]), x, weight) < TOLERANCE[dtype] * 1.5


CONFIGS: list[tuple[int, Config]] = [
    (5, MmaConfig(r=1, wr=1, wk=4)),
    (5, MmaConfig(r=1, wr=3, wk=5, cl=2, dx=0, xch=3)),
    (8, MmaConfig(r=4, wr=2, wk=3, p=3, xch=1, dx=0)),
    (16, MmaConfig(r=2, wr=1, wk=16, cl=2, p=4)),
    (13, MmaConfig(r=4, wr=2, wk=7, cl=2, p=2)),
    (32, MmaConfig(r=1, wr=2, wk=4, p=2)),
    (24, RingConfig(wr=3, split=2)),
    (32, RingConfig(wr=1, wk=4, split=3, stages=6)),
    (64, RingConfig(wr=2, wk=2, split=4, stages=3)),
    (48, RingConfig(wr=4, split=7, xc=3, stages=2)),
    (64, RingConfig(wr=1, wk=4, share=1, stages=3)),
    (40, RingConfig(wr=1, wk=3, share=1, xc=6, stages=2)),
    (64, RingConfig(wr=4, share=1, xc=2)),
    (33, RingConfig(wr=2, wk=2, share=1, split=2, stages=3)),
    (16, RingConfig(wr=3, share=2, xc=2, stages=5)),
    (9, RingConfig(wr=1, wk=1, xc=1)),
    (32, RingConfig(wr=1, wk=4, split=2, xc=8, stages=3)),
]


@pytest.mark.parametrize(("m", "config"), CONFIGS)
@pytest.mark.parametrize("shape", [(1040, 33 * 64), (448, 64 * 64)])
def test_every_way_to_cut(m: int, config: Config, shape: tuple[int, int]) -> None:
    weight, x = random_weight(*shape), activations(m, shape[1])
    assert relative_error(run(x, [weight], config), x, weight) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_no_less_accurate_than_dequantized_weights_in_cublas(m: int) -> None:
    weight, x = random_weight(4096, 4096), activations(m, 4096)
    cublas = x @ weight.dequantize(torch.bfloat16).T
    assert relative_error(run(x, [weight]), x, weight) <= relative_error(cublas, x, weight) * 1.01


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 100])
def test_stacked_parts_and_bias(m: int) -> None:
    parts = [random_weight(n, 512, n) for n in (256, 64, 72)]
    x, bias = activations(m, 512), activations(1, 392, seed=3)[0]
    out = nf4_linear(x, repack(parts), bias=bias)
    plain = run(x, parts)
    assert relative_error(plain, x, *parts) < TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(out.float(), plain.float() + bias.float(), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14336)])
def test_repeats_are_bit_identical(m: int, shape: tuple[int, int]) -> None:
    weight, x = repack([random_weight(*shape)]), activations(m, shape[1])
    first = nf4_linear(x, weight)
    for _ in range(20):
        assert torch.equal(nf4_linear(x, weight), first)


@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_chain_of_dependent_launches_in_a_graph(m: int) -> None:
    """Each launch reads what the one before wrote, and may start before that one ends."""
    sizes = [(1024, 512), (2048, 1024), (512, 2048)]
    weights = [repack([random_weight(n, k, seed)]) for seed, (n, k) in enumerate(sizes)]
    x = activations(m, 512)

    def chain(value: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            for weight in weights:
                value = nf4_linear(value, weight)
        return value

    chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x)
    for seed in range(3):
        x.copy_(activations(m, 512, seed=10 + seed))
        value = x
        for _ in range(4):
            for weight in weights:
                value = nf4_linear(value, weight, dependent=False)
                torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, value)


def test_unpack_on_the_gpu_gives_back_every_bit() -> None:
    parts = [random_weight(n, 256, n) for n in (96, 64)]
    for part, back in zip(parts, Nf4Gemm(parts).unpack(), strict=True):
        assert torch.equal(part.packed, back.packed)
        assert torch.equal(part.dequantize(torch.float32), back.dequantize(torch.float32))


def test_tiny_and_huge_scales() -> None:
    weight, x = random_weight(128, 256), activations(4, 256)
    for factor in (1e-7, 1e5):
        scaled = replace(weight, nested_absmax=weight.nested[1] * factor, offset=weight.nested[3] * factor)
        assert relative_error(run(x, [scaled]), x, scaled) < TOLERANCE[torch.bfloat16] * 1.5
