"""Attention over the paged cache, planned once a step and run at every layer.

Single-row sequences of similar length are computed together; a sequence with more rows (a prompt, or a chunk of one)
is computed alone. What a layer needs beyond its own q, k and v - which blocks to read, what is visible - depends only
on the batch and the layer's window, so it is worked out before the first layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loraplex_server.model.batch import Batch


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """b sequences with one row each, over keys gathered from ``block_ids`` [b * m].

    Shapes: rows [b], None when they are all rows in order; mask [b, 1, 1, L] additive, None when every gathered key
    in ``[first_key, last_key)`` is visible.
    """

    size: int
    rows: Tensor | None
    block_ids: Tensor
    first_key: int
    last_key: int
    mask: Tensor | None

    def run(self, q: Tensor, k_blocks: Tensor, v_blocks: Tensor, out: Tensor) -> None:
        rows = q if self.rows is None else q.index_select(0, self.rows)
        num_kv_heads, head_dim = k_blocks.shape[2:]
        # The query heads that share a key head take the place of query positions: no key is repeated in memory.
        query = rows.view(self.size, num_kv_heads, -1, head_dim)
        keys, values = (
            blocks.index_select(0, self.block_ids)
            .view(self.size, -1, num_kv_heads, head_dim)[:, self.first_key : self.last_key]
            .transpose(1, 2)
            for blocks in (k_blocks, v_blocks)
        )
        found = scaled_dot_product_attention(query, keys, values, attn_mask=self.mask).reshape(rows.shape)
        if self.rows is None:
            out.copy_(found)
        else:
            out.index_copy_(0, self.rows, found)


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Rows ``[start, stop)`` of one sequence. Without ``block_ids`` its keys are those of the same rows.

    Shapes: mask [n, L] additive; None = causal over the rows themselves.
    """

    start: int
    stop: int
    block_ids: Tensor | None
    num_keys: int
    mask: Tensor | None

    def run(self, q: Tensor, k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor, out: Tensor) -> None:
        keys, values = k[self.start : self.stop], v[self.start : self.stop]
        if self.block_ids is not None:
            keys, values = (
                blocks.index_select(0, self.block_ids).flatten(0, 1)[: self.num_keys] for blocks in (k_blocks, v_blocks)
            )
        found = scaled_dot_product_attention(
            q[self.start : self.stop].transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[self.start : self.stop] = found[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How one batch attends at layers of one window."""

    kv_slots: Tensor
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillSpan, ...]

    @classmethod
    def build(cls, batch: Batch, *, block_size: int, window: int | None, dtype: torch.dtype) -> "AttentionPlan":
        """Plan ``batch`` for layers that see ``window`` tokens (None: all); ``dtype`` is that of the scores' masks."""
        start, decodes, prefills = 0, [], []
        for index, (rows, num_keys) in enumerate(zip(batch.query_lens, batch.prefix_and_query_lens, strict=True)):
            if rows == 1:
                decodes.append(_Decode(index, start, num_keys, max(0, num_keys - (window or num_keys))))
            else:
                table = batch.block_tables[index]
                prefills.append(_prefill(table, start, rows, num_keys, block_size, window, dtype))
            start += rows
        groups = tuple(_decode_group(batch, group, block_size, dtype) for group in _similar(decodes, block_size))
        return cls(batch.kv_slots, groups, tuple(prefills))

    @classmethod
    def build_all(
        cls, batch: Batch, *, block_size: int, windows: Iterable[int | None], dtype: torch.dtype
    ) -> dict[int | None, "AttentionPlan"]:
        """One plan for each distinct window; windows that reach past every sequence share the full plan."""
        longest = max(batch.prefix_and_query_lens)
        plans: dict[int | None, AttentionPlan] = {}
        for window in dict.fromkeys(windows):
            reach = window if window is not None and window < longest else None
            if reach not in plans:
                plans[reach] = cls.build(batch, block_size=block_size, window=reach, dtype=dtype)
            plans[window] = plans[reach]
        return plans

    def run(self, q: Tensor, k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor) -> Tensor:
        """Write k and v into the cache and attend. Defined by ``paged_attention_ref``.

        Shapes: q [T, H, D]; k, v [T, Hkv, D]; k_blocks, v_blocks [blocks, block_size, Hkv, D] -> [T, H * D].
        """
        # Masked keys still meet a weight of zero, and zero times NaN is NaN: one sequence's overflow, left behind in a
        # block, would reach the next sequence that gets this block.
        k_blocks.flatten(0, 1).index_copy_(0, self.kv_slots, k.nan_to_num(0, 0, 0))
        v_blocks.flatten(0, 1).index_copy_(0, self.kv_slots, v.nan_to_num(0, 0, 0))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in self.decodes:
            group.run(q, k_blocks, v_blocks, out)
        for span in self.prefills:
            span.run(q, k, v, k_blocks, v_blocks, out)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class _Decode:
    """A single-row sequence: keys ``[first_key, num_keys)`` are visible to its row."""

    index: int
    row: int
    num_keys: int
    first_key: int

    def first_block(self, block_size: int) -> int:
        return self.first_key // block_size

    def num_blocks(self, block_size: int) -> int:
        return -(-self.num_keys // block_size) - self.first_block(block_size)


def _similar(decodes: list[_Decode], block_size: int) -> Iterable[list[_Decode]]:
    """Groups in which padding to the longest at most doubles what is read."""
    group: list[_Decode] = []
    for decode in sorted(decodes, key=lambda d: -d.num_blocks(block_size)):
        if group and 2 * decode.num_blocks(block_size) < group[0].num_blocks(block_size):
            yield sorted(group, key=lambda d: d.row)
            group = []
        group.append(decode)
    if group:
        yield sorted(group, key=lambda d: d.row)


def _decode_group(batch: Batch, group: list[_Decode], block_size: int, dtype: torch.dtype) -> DecodeGroup:
    tables, device = batch.block_tables, batch.block_tables.device
    width = max(d.num_blocks(block_size) for d in group)
    first_blocks = torch.tensor([d.first_block(block_size) for d in group])
    # Past its own end a sequence reads any valid block; the mask hides it.
    columns = (first_blocks[:, None] + torch.arange(width)).clamp_(max=tables.shape[1] - 1)
    indices = torch.tensor([d.index for d in group])
    block_ids = tables[indices[:, None].to(device), columns.to(device)].long().flatten()
    bases = [d.first_block(block_size) * block_size for d in group]
    first = [d.first_key - base for d, base in zip(group, bases, strict=True)]
    last = [d.num_keys - base for d, base in zip(group, bases, strict=True)]
    low, high, mask = min(first), max(last), None
    if max(first) != low or min(last) != high:
        keys = torch.arange(low, high)
        visible = (keys >= torch.tensor(first)[:, None]) & (keys < torch.tensor(last)[:, None])
        mask = _additive(visible, dtype, device)[:, None, None]
    rows = [d.row for d in group]
    in_order = rows == list(range(batch.num_tokens))
    return DecodeGroup(len(group), None if in_order else torch.tensor(rows, device=device), block_ids, low, high, mask)


def _prefill(
    table: Tensor, start: int, rows: int, num_keys: int, block_size: int, window: int | None, dtype: torch.dtype
) -> PrefillSpan:
    prefix = num_keys - rows
    stop = start + rows
    if prefix == 0 and (window is None or window >= rows):
        return PrefillSpan(start, stop, None, rows, None)
    first_block = 0 if window is None else max(0, prefix + 1 - window) // block_size
    base = first_block * block_size
    key_pos, query_pos = torch.arange(base, num_keys), torch.arange(prefix, num_keys)[:, None]
    visible = key_pos <= query_pos
    if window is not None:
        visible &= key_pos > query_pos - window
    mask = _additive(visible, dtype, table.device)
    if prefix == 0:
        return PrefillSpan(start, stop, None, rows, mask)
    block_ids = table[first_block : -(-num_keys // block_size)].long()
    return PrefillSpan(start, stop, block_ids, num_keys - base, mask)


def _additive(visible: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    return mask.to(device, non_blocking=True)
