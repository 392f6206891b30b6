"""A decode step's attention in one launch against the same in plain torch."""

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_support import DEVICE, DTYPES, ON_GPU, assert_close, randn

from loraplex_server.kernels.attention_rows import MAX_SPLITS, RowsWorkspace, attend_rows, num_lanes, takes  # isort: skip
from loraplex_server.kernels.attention_rows_ref import attend_rows_ref

HEADS = [(4, 1, 64), (8, 2, 128), (7, 1, 128), (14, 2, 64), (2, 2, 128), (12, 1, 64), (6, 2, 96)]
SIXTEEN_BIT = [dtype for dtype in DTYPES if dtype.itemsize == 2]


class Step:
    """One decode step: rows of q, k and v, tables in shuffled order, and NaN wherever no row has a key yet."""

    def __init__(
        self,
        kv_lens: list[int],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        block_size: int = 16,
        with_norm: bool = False,
    ) -> None:
        num_heads, num_kv_heads, head_dim = heads
        self.heads, self.block_size, num_rows = heads, block_size, len(kv_lens)
        width = -(-max(kv_lens) // block_size) + 1
        order = torch.randperm(width * num_rows, generator=torch.Generator().manual_seed(9))
        self.tables = order.view(num_rows, width).int().to(DEVICE)
        self.kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
        self.positions = (self.kv_lens.long() - 1).clamp(min=0)
        blocks = self.tables.long().gather(1, self.positions[:, None] // block_size)[:, 0]
        slots = blocks * block_size + self.positions % block_size
        self.kv_slots = torch.where(self.kv_lens > 0, slots, -1)
        shape = (width * num_rows, block_size, num_kv_heads, head_dim)
        self.k, self.v = randn(*shape, seed=10, dtype=dtype), randn(*shape, seed=11, dtype=dtype)
        position = torch.arange(width * block_size, device=DEVICE).view(width, block_size)
        for table, length in zip(self.tables.long(), kv_lens, strict=True):
            for cache in (self.k, self.v):
                cache[table] = cache[table].masked_fill((position >= length - 1)[:, :, None, None], float("nan"))
        self.qkv = randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, seed=12, dtype=dtype)
        angles = torch.arange(max(kv_lens) + 1)[:, None] / 10000.0 ** (torch.arange(head_dim // 2) / (head_dim // 2))
        self.cos, self.sin = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)
        self.qk_norm = randn(num_heads + num_kv_heads, head_dim, seed=13, dtype=dtype) if with_norm else None

    def workspace(self) -> RowsWorkspace:
        num_heads, num_kv_heads, head_dim = self.heads
        return RowsWorkspace.allocate(
            max_sequences=self.qkv.shape[0], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            block_size=self.block_size, dtype=self.qkv.dtype, device=DEVICE,
        )  # fmt: skip

    def run(
        self, workspace: RowsWorkspace, rows: slice = slice(None), window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output and both caches, from copies of everything that is written."""
        k, v = self.k.clone(), self.v.clone()
        out = attend_rows(
            self.qkv[rows].clone(), self.positions[rows], self.cos, self.sin, self.kv_slots[rows], k, v,
            self.tables[rows], self.kv_lens[rows], workspace, qk_norm=self.qk_norm, eps=1e-6, window=window,
        )  # fmt: skip
        return out, k, v

    def expected(self, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.k.clone(), self.v.clone()
        out = attend_rows_ref(
            self.qkv.clone(), self.positions, self.cos, self.sin, self.kv_slots, k, v, self.tables, self.kv_lens,
            qk_norm=self.qk_norm, eps=1e-6, window=window,
        )  # fmt: skip
        return out, k, v


def assert_same_step(got: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    assert_close(got[0], expected[0])
    for cache, wanted in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(cache.isnan(), wanted.isnan())
        assert_close(cache.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("with_norm", [False, True])
def test_rows_attend_over_their_keys_and_write_the_new_one(
    heads: tuple[int, int, int], with_norm: bool, dtype: torch.dtype
) -> None:
    step = Step([1, 16, 17, 100, 300, 2], heads, dtype, with_norm=with_norm)
    workspace = step.workspace()
    assert_same_step(step.run(workspace), step.expected())
    assert not bool(workspace.counters.any())


@pytest.mark.parametrize("window", [1, 20, 200])
def test_rows_see_only_their_window(window: int) -> None:
    step = Step([5, 64, 290, 1], (4, 1, 64), SIXTEEN_BIT[0], block_size=32)
    assert_same_step(step.run(step.workspace(), window=window), step.expected(window))


@pytest.mark.skipif(not ON_GPU, reason="too much for the interpreter")
@pytest.mark.parametrize("lens", [[4097, 513, 257], [5000] * 2, [777] * 40, [255, 256, 257, 258]])
def test_long_sequences_are_split_and_joined(lens: list[int]) -> None:
    step = Step(lens, (8, 2, 128), torch.bfloat16)
    workspace = step.workspace()
    assert_same_step(step.run(workspace), step.expected())
    assert not bool(workspace.counters.any())


def test_a_row_without_keys_becomes_zeros_and_writes_nothing() -> None:
    step = Step([0, 40, 0], (2, 1, 64), SIXTEEN_BIT[0])
    out, k, v = step.run(step.workspace())
    assert not bool(out[0].any())
    assert not bool(out[2].any())
    expected = step.expected()
    assert_same_step((out[1:2], k, v), (expected[0][1:2], *expected[1:]))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs the Triton kernels, whose own test holds this")
def test_a_row_has_the_same_bits_alone_and_in_any_batch() -> None:
    lens = [700, 3, 260, 1300, 130] * 30
    step = Step(lens, (8, 2, 128), torch.bfloat16)
    workspace = step.workspace()
    together = step.run(workspace)[0]
    assert num_lanes(len(lens) * 2, 1300) == 1
    for row in range(5):
        assert num_lanes(2, lens[row]) >= min(2, -(-lens[row] // 256))
        assert torch.equal(step.run(workspace, slice(row, row + 1))[0][0], together[row])
    assert torch.equal(step.run(workspace, slice(0, 5))[0], together[:5])


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_fused_kernel_runs_the_shapes_it_says() -> None:
    for num_heads, num_kv_heads, head_dim in HEADS:
        fits = head_dim in (64, 128) and num_heads // num_kv_heads <= 8
        assert takes(num_heads, num_kv_heads, head_dim, 16, torch.bfloat16, DEVICE) == (
            fits and torch.cuda.get_device_capability() >= (9, 0)
        )
    assert not takes(4, 1, 64, 8, torch.bfloat16, DEVICE)
    assert not takes(4, 1, 64, 16, torch.float32, DEVICE)


def test_lanes_never_exceed_splits() -> None:
    assert num_lanes(8, 320) == 2
    assert num_lanes(8, 100_000) == MAX_SPLITS
    assert num_lanes(64, 100_000) == 4
    assert num_lanes(128, 100_000) == 1
    assert num_lanes(512, 100_000) == 1
