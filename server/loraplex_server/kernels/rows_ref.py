"""What a decode step's rows mean, in plain torch: from the little that the host sends to what the model reads."""

from typing import Final

import torch
from torch import Tensor

# Columns of the packed rows that the host sends each step.
TOKEN: Final = 0  # the row's last token, or -1: it is the one that the row sampled in the step before
POSITION: Final = 1  # of that token; -1 marks a row without a sequence
ADAPTER: Final = 2  # its adapter's slot, -1 = base
NEW_BLOCK: Final = 3  # a KV block that its table gets at this position, or -1
NUM_COLUMNS: Final = 4


def prepare_rows_ref(
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
    """Fill a step's inputs in place; defines ``prepare_rows``.

    Rows without a sequence read token 0 at position 0, attend to nothing (kv_len 0) and write nothing (slot -1).
    Shapes: packed [B, 4] int32 (columns above), sampled [B] int64, block_tables [B, M] int32 (updated);
    token_ids, positions, kv_slots [B] int64; kv_lens, adapters [B] int32.
    """
    rows = packed.long()
    live = rows[:, POSITION] >= 0
    position = rows[:, POSITION].clamp(min=0)
    column = (position // block_size)[:, None]
    known = block_tables.gather(1, column)[:, 0]
    block = torch.where(rows[:, NEW_BLOCK] >= 0, packed[:, NEW_BLOCK], known)
    block_tables.scatter_(1, column, block[:, None])
    token_ids.copy_(torch.where(rows[:, TOKEN] >= 0, rows[:, TOKEN], sampled) * live)
    positions.copy_(position)
    kv_slots.copy_(torch.where(live, block.long() * block_size + position % block_size, -1))
    kv_lens.copy_((position + 1) * live)
    adapters.copy_(torch.where(live, rows[:, ADAPTER], -1))
