"""NF4 against bitsandbytes, on the CPU."""

import bitsandbytes.functional as bnb
import pytest
import torch

from loraplex_server.kernels.nf4 import Nf4FormatError, Nf4Weight
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
