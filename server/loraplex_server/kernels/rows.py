# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""A decode step's inputs from what the host sends, in one launch. Defined by ``prepare_rows_ref``."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_server.kernels.launch import launch_options


@triton.jit
def _prepare_kernel(
    packed_ptr, sampled_ptr, tables_ptr, table_stride, token_ids_ptr, positions_ptr, slots_ptr, lens_ptr, adapters_ptr,
    num_rows, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, BLOCK)
    mask = row < num_rows
    token = tl.load(packed_ptr + row * 4, mask=mask, other=0).to(tl.int64)
    position = tl.load(packed_ptr + row * 4 + 1, mask=mask, other=-1).to(tl.int64)
    adapter = tl.load(packed_ptr + row * 4 + 2, mask=mask, other=-1)
    new_block = tl.load(packed_ptr + row * 4 + 3, mask=mask, other=-1)
    live = position >= 0
    position = tl.maximum(position, 0)
    entry = tables_ptr + row.to(tl.int64) * table_stride + position // BLOCK_SIZE
    is_new = mask & (new_block >= 0)
    block = tl.where(is_new, new_block, tl.load(entry, mask=mask & (new_block < 0), other=0))
    tl.store(entry, block, mask=is_new)
    sampled = tl.load(sampled_ptr + row, mask=mask & (token < 0), other=0)
    token = tl.where(token < 0, sampled, token)
    tl.store(token_ids_ptr + row, tl.where(live, token, 0), mask=mask)
    tl.store(positions_ptr + row, position, mask=mask)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slots_ptr + row, tl.where(live, slot, -1), mask=mask)
    tl.store(lens_ptr + row, tl.where(live, position + 1, 0).to(tl.int32), mask=mask)
    tl.store(adapters_ptr + row, tl.where(live, adapter, -1), mask=mask)


def prepare_rows(
    packed: Tensor,
    sampled: Tensor,
    block_tables: Tensor,
    block_size: int,
    token_ids: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    kv_lens: Tensor,
    adapters: Tensor,
) -> None:
    """``prepare_rows_ref``; every tensor but block_tables is contiguous."""
    num_rows = packed.shape[0]
    _prepare_kernel[(1,)](
        packed, sampled, block_tables, block_tables.stride(0), token_ids, positions, kv_slots, kv_lens, adapters,
        num_rows, BLOCK_SIZE=block_size, BLOCK=max(256, triton.next_power_of_2(num_rows)), num_warps=4,
        **launch_options(packed.device),
    )  # fmt: skip
