"""Our quantization against bitsandbytes', bit for bit."""

import pytest
import torch

from loraplex_server.kernels.nf4_quantize import can_quantize, dynamic_code, quantize
from loraplex_server.kernels.nf4_weight import Nf4Weight


def test_the_dynamic_code_is_bitsandbytes_own() -> None:
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(dynamic_code(), create_dynamic_map())


def test_what_is_not_on_a_gpu_in_16_bits_goes_to_bitsandbytes() -> None:
    assert not can_quantize(torch.zeros(64, 64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (48, 192), (1000, 4096), (2048, 8960)])
@pytest.mark.parametrize("kind", ["normal", "uneven", "zeros"])
def test_every_bit_is_bitsandbytes_own(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(shape, device="cuda") * 0.02
    if kind == "uneven":
        weight *= torch.exp(3 * torch.randn(shape[0], 1, device="cuda"))
    if kind == "zeros":
        weight[:, :64] = 0.0
    weight = weight.to(dtype)
    assert can_quantize(weight)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    expected = Nf4Weight.from_quant_state(packed, state).tensors()
    for name, part in quantize(weight)._asdict().items():
        assert torch.equal(part.reshape(-1).nan_to_num(), expected[name].reshape(-1).nan_to_num()), name
