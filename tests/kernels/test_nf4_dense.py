"""Many rows times NF4 matrices: the matrix made dense on a GPU, and what cuBLAS makes of it."""

import pytest
import torch

from loraplex_server.kernels import nf4_cuda
from loraplex_server.kernels.nf4 import repack
from loraplex_server.kernels.nf4_dense import dequantize, gemm_dense
from tests.kernels.test_nf4_gpu import activations, random_weight, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and nf4_cuda.supported(0)), reason="needs a Hopper GPU or newer, and NVRTC"
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (17, 128), (1000, 192), (6144, 4096)])
def test_the_dense_matrix_is_the_quantized_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = repack([random_weight(*shape)])
    dense = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    dequantize(weight, dense)
    # The last bit of a product may round the other way.
    torch.testing.assert_close(dense, weight.dequantize(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_matrices_of_any_size_take_turns_in_one_place() -> None:
    shapes = [(256, 128), (2048, 512), (64, 1024), (2048, 512)]
    weights = [random_weight(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    inputs = [activations(100, shape[1], seed=9) for shape in shapes]
    outs = [torch.empty(100, shape[0], dtype=torch.bfloat16, device="cuda") for shape in shapes]
    packed = [repack([weight]) for weight in weights]
    for x, weight, out in zip(inputs, packed, outs, strict=True):
        gemm_dense(x, weight, out, None)
    for x, weight, out in zip(inputs, weights, outs, strict=True):
        assert relative_error(out, x, weight) < 2.6e-3
    held = torch.cuda.memory_allocated()
    for x, weight, out in zip(inputs, packed, outs, strict=True):
        gemm_dense(x, weight, out, None)
    assert torch.cuda.memory_allocated() == held
