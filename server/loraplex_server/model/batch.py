"""The immutable input of one forward pass: flattened tokens and where their keys and values live.

A value that is passed down, never ambient state. Alphabet: T tokens of this step, B sequences, R rows whose logits
are wanted, M blocks in the longest block table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``[start, stop)`` of a batch that use the adapter in pool slot ``slot``."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of B sequences, flattened; the sequences of one adapter stand next to each other.

    Shapes and units:
        token_ids [T] int64; positions [T] int64 (0-based in the sequence);
        kv_slots [T] int64: where each token's K and V are written, ``block * block_size + offset``;
        query_starts [B + 1] int32: rows of sequence i are query_starts[i]..query_starts[i + 1];
        kv_lens [B] int32: tokens of sequence i after this step (prefix + its rows here);
        block_tables [B, M] int32, rows padded with 0;
        token_adapters [T] int32: pool slot of each token's adapter, -1 = base only;
        logit_rows [Rows] int64: rows whose hidden state goes through the head.
    ``query_lens`` and ``prefix_and_query_lens`` repeat on the host what the device tensors say, so that the plain
    torch path never waits for the device. ``segments`` says the same as token_adapters, for the host.
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    query_starts: Tensor
    kv_lens: Tensor
    block_tables: Tensor
    token_adapters: Tensor
    logit_rows: Tensor
    query_lens: tuple[int, ...]
    prefix_and_query_lens: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return len(self.query_lens)


def send(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``, copied in the stream's order.

    Out of pinned memory, so that the host waits for nothing that still runs on the device.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
