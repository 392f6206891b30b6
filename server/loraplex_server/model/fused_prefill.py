"""Prompts on a GPU: the same mathematics as ``Decoder.forward`` for any batch, through fused kernels."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraplex_server.kernels.activation import silu_mul
from loraplex_server.kernels.attention_prefill import paged_prefill
from loraplex_server.kernels.norm import add_rms_norm, rms_norm
from loraplex_server.kernels.rope_cache import rope_and_cache
from loraplex_server.model.adapters import AdapterLookup
from loraplex_server.model.batch import Batch
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.kv_cache import KVCache
from loraplex_server.model.linear import GroupLinear, add_adapters


class FusedPrefill:
    """Runs any batch on a decoder's weights over one KV cache."""

    def __init__(self, decoder: Decoder, kv: KVCache) -> None:
        self._decoder = decoder
        self._kv = kv

    @torch.inference_mode()
    def forward(self, batch: Batch, adapters: AdapterLookup) -> Tensor:
        """Normed hidden states [T, H]."""
        spec, layers = self._decoder.spec, self._decoder.layers
        longest = max(batch.query_lens)
        cos, sin = self._decoder.rope.tables(max(batch.prefix_and_query_lens))

        def multiply(weights: GroupLinear, x: Tensor, layer: int, group: str) -> Tensor:
            out = weights(x)
            add_adapters(out, x, batch, adapters, layer, group)
            return out

        hidden = embedding(batch.token_ids, self._decoder.embed)
        x = rms_norm(hidden, layers[0].input_norm, spec.rms_eps)
        for index, layer in enumerate(layers):
            qkv = multiply(layer.qkv, x, index, "qkv")
            k, v = self._kv.k[index], self._kv.v[index]
            rope_and_cache(
                qkv, batch.positions, cos, sin, batch.kv_slots, k, v, qk_norm=layer.qk_norm, eps=spec.rms_eps
            )
            q = qkv[:, : spec.q_size].view(-1, spec.num_heads, spec.head_dim)
            mixed = paged_prefill(
                q,
                k,
                v,
                batch.block_tables,
                batch.query_starts,
                batch.kv_lens,
                max_query_len=longest,
                window=spec.windows[index],
            ).flatten(1)
            out = multiply(layer.o, mixed, index, "o")
            x = add_rms_norm(out, hidden, layer.post_norm, spec.rms_eps)
            inner = silu_mul(multiply(layer.gate_up, x, index, "gate_up"))
            out = multiply(layer.down, inner, index, "down")
            following = layers[index + 1].input_norm if index + 1 < len(layers) else self._decoder.final_norm
            x = add_rms_norm(out, hidden, following, spec.rms_eps)
        return x
