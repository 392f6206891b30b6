"""Decode rows on a GPU: the same mathematics as ``Decoder.forward``, through fused kernels.

Nothing here depends on values that only the device knows, so that a pass can be captured into a CUDA graph and replayed
for any sequences, lengths and adapters.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraplex_server.kernels.activation import silu_mul
from loraplex_server.kernels.attention_rows import RowsWorkspace, attend_rows
from loraplex_server.kernels.norm import add_rms_norm, rms_norm
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.kv_cache import KVCache
from loraplex_server.model.linear import GroupLinear


class Input(Protocol):
    """What a group of linears multiplies: rows x [T, K], and whatever its maker adds for them."""

    @property
    def x(self) -> Tensor:
        """The rows."""


class Target(NamedTuple):
    """A group of linears of one layer."""

    weights: GroupLinear
    layer: int
    group: str


class Linears(Protocol):
    """Makes the inputs of groups of linears and multiplies them, every row's adapter delta included."""

    def norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, target: Target
    ) -> tuple[Input, Tensor]:
        """The norm of residual + x, which is the target's input, and that sum. May write to ``residual``."""

    def gated(self, gate_up: Tensor, target: Target) -> Input:
        """silu(gate) * up, the target's input."""

    def attended(self, x: Tensor, target: Target) -> Input:
        """The attention's output as the target's input."""

    def multiply(self, given: Input, target: Target) -> Tensor:
        """x @ W.T and the rows' adapter deltas. Shape: [T, N]."""


@dataclass(frozen=True, slots=True)
class Plain:
    """An ``Input`` of x alone."""

    x: Tensor


class BaseAlone:
    """``Linears`` for rows without adapters."""

    def norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, target: Target
    ) -> tuple[Input, Tensor]:
        if residual is None:
            return Plain(rms_norm(x, weight, eps)), x
        return Plain(add_rms_norm(x, residual, weight, eps)), residual

    def gated(self, gate_up: Tensor, target: Target) -> Input:
        return Plain(silu_mul(gate_up))

    def attended(self, x: Tensor, target: Target) -> Input:
        return Plain(x)

    def multiply(self, given: Input, target: Target) -> Tensor:
        return target.weights(given.x)


base_alone: Final = BaseAlone()


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
    def decode(self, rows: DecodeRows, num_positions: int, linears: Linears) -> Tensor:
        """One token for each row; logits [B, V] in the model's dtype. ``num_positions`` bounds the positions."""
        spec, layers = self._decoder.spec, self._decoder.layers
        cos, sin = self._decoder.rope.tables(num_positions)
        out, residual = embedding(rows.token_ids, self._decoder.embed), None
        for index, layer in enumerate(layers):
            qkv, o = Target(layer.qkv, index, "qkv"), Target(layer.o, index, "o")
            gate_up, down = Target(layer.gate_up, index, "gate_up"), Target(layer.down, index, "down")
            given, residual = linears.norm(out, residual, layer.input_norm, spec.rms_eps, qkv)
            mixed = attend_rows(
                linears.multiply(given, qkv), rows.positions, cos, sin, rows.kv_slots, self._kv.k[index],
                self._kv.v[index], rows.block_tables, rows.kv_lens, self._workspace,
                qk_norm=layer.qk_norm, eps=spec.rms_eps, window=spec.windows[index],
            )  # fmt: skip
            out = linears.multiply(linears.attended(mixed.flatten(1), o), o)
            given, residual = linears.norm(out, residual, layer.post_norm, spec.rms_eps, gate_up)
            inner = linears.gated(linears.multiply(given, gate_up), down)
            out = linears.multiply(inner, down)
        assert residual is not None
        return self._decoder.scores(add_rms_norm(out, residual, self._decoder.final_norm, spec.rms_eps))
