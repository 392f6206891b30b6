"""Decode rows on a GPU: the same mathematics as ``Decoder.forward``, through fused kernels.

Nothing here depends on values that only the device knows, so that a pass can be captured into a CUDA graph and replayed
for any sequences, lengths and adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraplex_server.kernels.activation import silu_mul
from loraplex_server.kernels.attention_rows import RowsWorkspace, attend_rows
from loraplex_server.kernels.norm import add_rms_norm, rms_norm
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.kv_cache import KVCache
from loraplex_server.model.linear import GroupLinear

# (weights, x [T, K], layer, group) -> [T, N]: one group of linears, every row's adapter delta included.
Multiply = Callable[[GroupLinear, Tensor, int, str], Tensor]


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One query row for each of B sequences. ``kv_lens`` 0 marks a row without a sequence.

    Shapes: token_ids, positions, kv_slots [B] int64; kv_lens, adapters [B] int32; block_tables [B, M] int32.
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    kv_lens: Tensor
    adapters: Tensor
    block_tables: Tensor


def base_alone(weights: GroupLinear, x: Tensor, layer: int, group: str) -> Tensor:
    """``Multiply`` for rows without adapters."""
    return weights(x)


class FusedForward:
    """Runs a decoder's weights over one KV cache. Holds the workspaces that the kernels reuse."""

    def __init__(self, decoder: Decoder, kv: KVCache, *, max_sequences: int) -> None:
        spec = decoder.spec
        self._decoder = decoder
        self._kv = kv
        self._workspace = RowsWorkspace.allocate(
            max_sequences=max_sequences,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=kv.block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )

    @torch.inference_mode()
    def decode(self, rows: DecodeRows, num_positions: int, multiply: Multiply) -> Tensor:
        """One token for each row; logits [B, V] in the model's dtype. ``num_positions`` bounds the positions."""
        spec, layers = self._decoder.spec, self._decoder.layers
        cos, sin = self._decoder.rope.tables(num_positions)
        hidden = embedding(rows.token_ids, self._decoder.embed)
        x = rms_norm(hidden, layers[0].input_norm, spec.rms_eps)
        for index, layer in enumerate(layers):
            qkv = multiply(layer.qkv, x, index, "qkv")
            mixed = attend_rows(
                qkv, rows.positions, cos, sin, rows.kv_slots, self._kv.k[index], self._kv.v[index],
                rows.block_tables, rows.kv_lens, self._workspace,
                qk_norm=layer.qk_norm, eps=spec.rms_eps, window=spec.windows[index],
            )  # fmt: skip
            out = multiply(layer.o, mixed.flatten(1), index, "o")
            x = add_rms_norm(out, hidden, layer.post_norm, spec.rms_eps)
            inner = silu_mul(multiply(layer.gate_up, x, index, "gate_up"))
            out = multiply(layer.down, inner, index, "down")
            following = layers[index + 1].input_norm if index + 1 < len(layers) else self._decoder.final_norm
            x = add_rms_norm(out, hidden, following, spec.rms_eps)
        return self._decoder.scores(x)
