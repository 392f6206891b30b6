"""NF4 against bitsandbytes, on the CPU."""

import bitsandbytes.functional as bnb
import pytest
import torch

from loraplex_server.kernels.nf4 import Nf4FormatError, Nf4Gemm, Nf4Weight, nf4_linear, repack
from loraplex_server.kernels.nf4_config import MEASURED, SHARED_BYTES, RingConfig, choose, token_tiles, with_room
from loraplex_server.kernels.nf4_layout import TABLE_GAIN, UNIT_BYTES
from loraplex_server.kernels.nf4_ref import dequantize_nf4_ref, nf4_linear_ref

SHAPES = [(64, 64), (192, 128), (100, 320), (7, 64), (33, 50), (3, 21)]


def matrix(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantize_is_bitsandbytes_exactly(shape: tuple[int, int], double_quant: bool) -> None:
    packed, state = bnb.quantize_4bit(matrix(shape), compress_statistics=double_quant, quant_type="nf4")
    weight = Nf4Weight.from_quant_state(packed, state)
    assert torch.equal(weight.dequantize(torch.float32), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_casts_the_float32_values_once(dtype: torch.dtype) -> None:
    weight = Nf4Weight.quantize(matrix((96, 128)))
    assert torch.equal(weight.dequantize(dtype), dequantize_nf4_ref(weight).to(dtype))


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantize_keeps_the_matrix(double_quant: bool) -> None:
    dense = matrix((128, 256))
    weight = Nf4Weight.quantize(dense, double_quant=double_quant)
    assert weight.is_nested == double_quant
    assert (weight.dequantize(torch.float32) - dense).norm() / dense.norm() < 0.1


def test_double_quantization_takes_4_13_bits_a_weight() -> None:
    weight = Nf4Weight.quantize(matrix((512, 512)))
    assert weight.num_bytes == 512 * 512 // 2 + 512 * 512 // 64 + 4 * (16 + 256 + 1)


def test_linear_ref_uses_the_dequantized_weight() -> None:
    weight, x, bias = Nf4Weight.quantize(matrix((48, 64))), matrix((5, 64), 1), matrix((1, 48), 2)[0]
    assert torch.equal(nf4_linear_ref(x, weight, bias), x @ weight.dequantize(torch.float32).T + bias)


def test_sizes_must_agree_with_the_shape() -> None:
    weight = Nf4Weight.quantize(matrix((64, 64)))
    with pytest.raises(Nf4FormatError, match="packed must be"):
        Nf4Weight(packed=weight.packed, shape=(64, 128), absmax=weight.block_absmax())
    with pytest.raises(Nf4FormatError, match="needs absmax_codes"):
        Nf4Weight(packed=weight.packed, shape=(64, 64))


def test_only_nf4_in_blocks_of_64_is_taken() -> None:
    packed, state = bnb.quantize_4bit(matrix((64, 64)), quant_type="fp4")
    with pytest.raises(Nf4FormatError, match="fp4"):
        Nf4Weight.from_quant_state(packed, state)


@pytest.mark.parametrize("rows", [(64,), (192,), (128, 64, 64), (100,), (40, 24, 8), (1,), (7, 130)])
@pytest.mark.parametrize("k", [64, 192])
@pytest.mark.parametrize("double_quant", [True, False])
def test_unpack_gives_back_every_bit(rows: tuple[int, ...], k: int, double_quant: bool) -> None:
    parts = [Nf4Weight.quantize(matrix((n, k), n), double_quant=double_quant) for n in rows]
    for part, back in zip(parts, repack(parts).unpack(), strict=True):
        assert back.shape == part.shape
        assert back.is_nested == double_quant
        assert torch.equal(back.packed, part.packed.reshape(-1))
        for name, value in part.host_statistics().items():
            assert torch.equal(getattr(back, name), value), name


@pytest.mark.parametrize("rows", [(128,), (40, 24, 8)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_repacked_values_keep_float16_accuracy(rows: tuple[int, ...], scale: float) -> None:
    parts = [Nf4Weight.quantize(matrix((n, 128), n) * scale) for n in rows]
    expected = torch.cat([part.dequantize(torch.float32) for part in parts])
    error = (repack(parts).dequantize(torch.float32) - expected).abs()
    assert (error <= expected.abs() * 2**-10).all()


def test_a_lane_reads_its_fragments_in_one_piece() -> None:
    """Byte 4q + 2o + h of lane 4g + t holds row 8h + g and k = 16q + 8o + 2t of its tile, as mma's A operand wants."""
    weight = Nf4Weight.quantize(matrix((128, 192)))
    codes = weight.packed.view(128, 96)
    units = repack([weight]).data.view(2, 3, UNIT_BYTES)
    scales = units[..., 2048:].contiguous().view(torch.float16).view(2, 3, 8, 4, 2)
    absmax = weight.block_absmax().view(128, 3)
    gain = repack([weight]).gain
    for block, k, tile, lane, byte in [(0, 0, 0, 0, 0), (1, 2, 3, 31, 15), (1, 0, 2, 13, 6), (0, 1, 1, 22, 9)]:
        g, t, q, o, h = lane // 4, lane % 4, byte // 4, byte // 2 % 2, byte % 2
        row = 64 * block + 16 * tile + 8 * h + g
        assert units[block, k, tile * 512 + lane * 16 + byte] == codes[row, 32 * k + 8 * q + 4 * o + t]
        expected = absmax[row, k] / (TABLE_GAIN * gain)
        assert scales[block, k, g, tile, h] == expected.half()


def test_cpu_linear_is_close_to_the_reference() -> None:
    parts = [Nf4Weight.quantize(matrix((n, 128), n)) for n in (64, 16)]
    x, bias = matrix((3, 128), 1), matrix((1, 80), 2)[0]
    expected = torch.cat([nf4_linear_ref(x, part) for part in parts], dim=-1) + bias
    out = torch.full((3, 80), float("nan"))
    assert nf4_linear(x, repack(parts), out, bias=bias) is out
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(Nf4Gemm(parts)(x, bias=bias), expected)


def test_parts_must_share_k() -> None:
    with pytest.raises(Nf4FormatError, match="one K"):
        repack([Nf4Weight.quantize(matrix((64, 64))), Nf4Weight.quantize(matrix((64, 128)))])
    with pytest.raises(Nf4FormatError, match="nothing"):
        repack([])


@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 32, 40, 64])
@pytest.mark.parametrize(
    "shape",
    [
        (64, 64),
        (1, 64),
        (100, 320),
        (2048, 1536),
        (17920, 1536),
        (1536, 8960),
        (4608, 3584),
        (37888, 3584),
        (3584, 18944),
        (6144, 4096),
        (28672, 4096),
        (4096, 14336),
        (200, 33 * 64),
    ],
)
@pytest.mark.parametrize("wgmma", [True, False])
def test_every_shape_has_a_valid_configuration(m: int, shape: tuple[int, int], wgmma: bool) -> None:
    config = choose(*shape, m, 132, wgmma=wgmma)
    row_blocks, k_blocks, rows = -(-shape[0] // 64), shape[1] // 64, token_tiles(m, wgmma=wgmma) * 8
    if isinstance(config, RingConfig):
        assert wgmma
        assert config.valid(rows, row_blocks, k_blocks, 132)
    else:
        assert config.valid(rows, row_blocks, k_blocks)
    if isinstance(config, RingConfig):
        own = config.wr - config.share / config.num_clustered
        assert config.grid(row_blocks) / config.split * own >= row_blocks
    else:
        assert config.grid(row_blocks) * config.wr * config.r / 4 >= row_blocks


def test_room_is_made_in_every_measured_ring() -> None:
    for (_, k), configs in MEASURED.items():
        for tiles, config in configs.items():
            if isinstance(config, RingConfig):
                smaller = with_room(config, tiles * 8, k // 64, 20_000)
                assert smaller.valid(tiles * 8, 1, k // 64, 132)
                assert smaller.shared_bytes(tiles * 8, k // 64) + 20_000 <= SHARED_BYTES
