"""Prompts on a GPU: the same mathematics as ``Decoder.forward`` for any batch, through fused kernels.

A pass works in buffers that are allocated once, so that it takes nothing large from the allocator. It goes layer by
layer, so that rows which decode need not wait for the whole of it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loraplex_server.kernels.activation import silu_mul
from loraplex_server.kernels.attention_prefill import paged_prefill
from loraplex_server.kernels.norm import add_rms_norm, rms_norm
from loraplex_server.kernels.rope_cache import rope_and_cache
from loraplex_server.model.batch import Batch
from loraplex_server.model.decoder import Decoder, DecoderLayer
from loraplex_server.model.kv_cache import KVCache
from loraplex_server.model.spec import ModelSpec


class PromptDeltas(Protocol):
    """The adapters of one batch's rows."""

    def add(self, out: Tensor, x: Tensor, layer: int, group: str) -> None:
        """Add every row's delta of ``group`` at ``layer`` to ``out`` [T, N] in place; x [T, K]."""
        ...

    def silu_mul(self, gate_up: Tensor, x: Tensor, layer: int, out: Tensor) -> Tensor:
        """The gated activation of ``gate_up`` [T, 2I] plus every row's delta. Shapes: x [T, K], out [T, I] -> out."""
        ...


@dataclass(frozen=True, slots=True)
class _Buffers:
    """One step's activations, flat; what is never needed at the same time shares a buffer.

    Elements: hidden [T, H]; x [T, max(H, q)] holds the normed rows, then what attention mixed; wide [T, max(qkv, H)]
    holds q, k and v, then the result of the linears that lead back to H; gate_up [T, 2I]; inner [T, I].
    """

    hidden: Tensor
    x: Tensor
    wide: Tensor
    gate_up: Tensor
    inner: Tensor

    @classmethod
    def allocate(cls, spec: ModelSpec, max_tokens: int, like: Tensor) -> "_Buffers":
        hidden, inner = spec.hidden_size, spec.intermediate_size
        widths = (hidden, max(hidden, spec.q_size), max(_qkv_size(spec), hidden), 2 * inner, inner)
        return cls(*(like.new_empty(max_tokens * width) for width in widths))


class FusedPrefill:
    """Runs batches of up to ``max_tokens`` rows, one at a time, on a decoder's weights over one KV cache."""

    def __init__(self, decoder: Decoder, kv: KVCache, *, max_tokens: int) -> None:
        self._decoder = decoder
        self._kv = kv
        self._buffers = _Buffers.allocate(decoder.spec, max_tokens, decoder.embed)

    @torch.inference_mode()
    def start(self, batch: Batch) -> Tensor:
        """Take in a batch; the normed rows that its first layer reads. Shape: [T, H], in a buffer of the pass."""
        hidden, x, _ = self._residual(batch)
        torch.index_select(self._decoder.embed, 0, batch.token_ids, out=hidden)
        return rms_norm(hidden, self._decoder.layers[0].input_norm, self._decoder.spec.rms_eps, out=x)

    @torch.inference_mode()
    def layer(self, index: int, batch: Batch, deltas: PromptDeltas | None) -> Tensor:
        """Run the batch that was started last through one more layer; the normed rows that the next one reads, or,
        after the last, the head. ``deltas`` None: all rows are the base's."""
        layers, eps = self._decoder.layers, self._decoder.spec.rms_eps
        layer, (hidden, x, out) = layers[index], self._residual(batch)
        mixed = self._attend(batch, deltas, index, layer, x)
        layer.o(mixed, out)
        if deltas is not None:
            deltas.add(out, mixed, index, "o")
        add_rms_norm(out, hidden, layer.post_norm, eps, out=x)
        inner = self._gate(deltas, index, layer, x)
        layer.down(inner, out)
        if deltas is not None:
            deltas.add(out, inner, index, "down")
        following = layers[index + 1].input_norm if index + 1 < len(layers) else self._decoder.final_norm
        return add_rms_norm(out, hidden, following, eps, out=x)

    def _residual(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of [T, H]: the rows, their norm, and what a linear adds to them."""
        size, buffers = self._decoder.spec.hidden_size, self._buffers
        hidden, x, out = (_rows(b, batch.num_tokens, size) for b in (buffers.hidden, buffers.x, buffers.wide))
        return hidden, x, out

    def _attend(self, batch: Batch, deltas: PromptDeltas | None, index: int, layer: DecoderLayer, x: Tensor) -> Tensor:
        spec, num_tokens = self._decoder.spec, batch.num_tokens
        k, v = self._kv.k[index], self._kv.v[index]
        qkv = layer.qkv(x, _rows(self._buffers.wide, num_tokens, _qkv_size(spec)))
        if deltas is not None:
            deltas.add(qkv, x, index, "qkv")
        cos, sin = self._decoder.rope.tables(max(batch.prefix_and_query_lens))
        rope_and_cache(qkv, batch.positions, cos, sin, batch.kv_slots, k, v, qk_norm=layer.qk_norm, eps=spec.rms_eps)
        mixed = _rows(self._buffers.x, num_tokens, spec.q_size)
        paged_prefill(
            qkv[:, : spec.q_size].view(-1, spec.num_heads, spec.head_dim),
            k,
            v,
            batch.block_tables,
            batch.query_starts,
            batch.kv_lens,
            max_query_len=max(batch.query_lens),
            window=spec.windows[index],
            out=mixed.view(-1, spec.num_heads, spec.head_dim),
        )
        return mixed

    def _gate(self, deltas: PromptDeltas | None, index: int, layer: DecoderLayer, x: Tensor) -> Tensor:
        size = self._decoder.spec.intermediate_size
        gate_up = layer.gate_up(x, _rows(self._buffers.gate_up, x.shape[0], 2 * size))
        inner = _rows(self._buffers.inner, x.shape[0], size)
        return silu_mul(gate_up, out=inner) if deltas is None else deltas.silu_mul(gate_up, x, index, inner)


def _rows(buffer: Tensor, num_rows: int, width: int) -> Tensor:
    return buffer[: num_rows * width].view(num_rows, width)


def _qkv_size(spec: ModelSpec) -> int:
    return (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
