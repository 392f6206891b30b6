"""The decoder: weights of one base model, and the forward pass over a batch."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_adapters.base import EMBED, FINAL_NORM, HEAD, BaseShape, ModuleKey
from loraplex_server.kernels.activation_ref import silu_mul_ref
from loraplex_server.kernels.norm_ref import rms_norm_ref
from loraplex_server.kernels.rope_ref import rope_ref
from loraplex_server.model.adapters import GROUPS, AdapterLookup
from loraplex_server.model.attention import AttentionPlan
from loraplex_server.model.base_shape import base_shape
from loraplex_server.model.batch import Batch, Segment
from loraplex_server.model.kv_cache import KVCache
from loraplex_server.model.linear import DenseLinear, GroupLinear, add_adapters, num_bytes
from loraplex_server.model.outside import OutsideSegments
from loraplex_server.model.rope import RopeTable
from loraplex_server.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer. ``qk_norm`` [H + Hkv, D] holds the norm of each query and key head, or None."""

    input_norm: Tensor
    qkv: GroupLinear
    qk_norm: Tensor | None
    o: GroupLinear
    post_norm: Tensor
    gate_up: GroupLinear
    down: GroupLinear

    @property
    def num_bytes(self) -> int:
        """Bytes of the layer's base tensors on the device."""
        norms = [self.input_norm, self.post_norm, *(() if self.qk_norm is None else (self.qk_norm,))]
        groups = (self.qkv, self.o, self.gate_up, self.down)
        return sum(map(num_bytes, norms)) + sum(group.num_bytes for group in groups)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every base tensor of the layer, by name."""
        yield "input_norm", self.input_norm
        if self.qk_norm is not None:
            yield "qk_norm", self.qk_norm
        yield "post_norm", self.post_norm
        for group in ("qkv", "o", "gate_up", "down"):
            linear: GroupLinear = getattr(self, group)
            for number, buffer in enumerate(linear.buffers()):
                yield f"{group}.{number}", buffer


@dataclass(frozen=True, slots=True)
class _Step:
    """What every layer of one forward pass shares."""

    batch: Batch
    kv: KVCache
    adapters: AdapterLookup
    outside: OutsideSegments
    plans: dict[int | None, AttentionPlan]
    cos: Tensor
    sin: Tensor


class Decoder:
    """A base model ready to run. Its weights are never written after loading.

    ``embed`` [V, H] and ``head``'s weight are one tensor in models with tied embeddings, except on a CPU, where the head
    has a faster layout. ``fingerprint`` identifies the checkpoint and the mathematics, see ``model.fingerprint``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        embed: Tensor,
        layers: tuple[DecoderLayer, ...],
        norm: Tensor,
        head: DenseLinear,
        fingerprint: str,
    ) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self.embed = embed
        self.layers = layers
        self.final_norm = norm
        self.head = head
        self.rope = RopeTable(spec.rope, max_tokens=spec.context_length, dtype=embed.dtype, device=embed.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, of the KV cache and of adapter factors."""
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def base_shape(self) -> BaseShape:
        """The base as adapters see it."""
        return base_shape(self.spec, self.fingerprint)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache, adapters: AdapterLookup) -> Tensor:
        """Run every token of ``batch``, writing its keys and values into ``kv``. Returns normed hidden states [T, H].

        Raises: whatever ``adapters`` raises for a slot that is not resident.
        """
        longest = max(batch.prefix_and_query_lens)
        cos, sin = self.rope.at(batch.positions, longest)
        plans = AttentionPlan.build_all(batch, block_size=kv.block_size, windows=self.spec.windows, dtype=self.dtype)
        outside = OutsideSegments.of(batch.segments, adapters)
        step = _Step(batch, kv, adapters, outside, plans, cos, sin)
        eps = self.spec.rms_eps
        hidden = outside.embed(batch.token_ids, self.embed)
        for index, layer in enumerate(self.layers):
            x = outside.norm(hidden, layer.input_norm, eps, (index, "input_layernorm"))
            hidden += self._attend(step, index, layer, x)
            x = outside.norm(hidden, layer.post_norm, eps, (index, "post_attention_layernorm"))
            hidden += self._mlp(step, index, layer, x)
        return outside.norm(hidden, self.final_norm, eps, FINAL_NORM)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, segments: Sequence[Segment] = (), adapters: AdapterLookup | None = None) -> Tensor:
        """Scores of the next token. Shapes: hidden [R, H] as ``forward`` returns it -> [R, V] float32.

        ``segments`` say which of these rows use which adapter; one that adds tokens makes V larger.
        """
        scores = self.scores(hidden)
        if adapters is not None:
            scores = OutsideSegments.of(segments, adapters).head(scores, hidden)
        return scores.float()

    @torch.inference_mode()
    def scores(self, hidden: Tensor) -> Tensor:
        """``logits`` in the model's own dtype."""
        return self.head(hidden)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the base in its plain layout, by name; a tied head that shares the embedding's is left out."""
        yield "embed", self.embed
        for index, layer in enumerate(self.layers):
            for name, buffer in layer.buffers():
                yield f"layers.{index}.{name}", buffer
        yield "norm", self.final_norm
        if self.head.weight is not self.embed:
            for buffer in self.head.buffers():
                yield "head", buffer

    @property
    def weight_bytes(self) -> int:
        """Bytes of all base tensors on the device."""
        plain = [self.embed, self.final_norm]
        head = 0 if self.head.weight is self.embed else self.head.num_bytes
        return sum(map(num_bytes, plain)) + sum(layer.num_bytes for layer in self.layers) + head

    def weight_rows(self, module: ModuleKey, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of a module's matrix as the adapters see it, dequantized. Shape: [rows, K]."""
        if module == EMBED or (module == HEAD and self.head.weight is self.embed):
            return self.embed[start:stop]
        if module == HEAD:
            return self.head.rows(start, stop)
        linear, first = self._part(module)
        return linear.rows(first + start, first + stop)

    def bias(self, module: ModuleKey) -> Tensor | None:
        """A linear's bias [N]; None where it has none."""
        if module in (EMBED, HEAD):
            return None
        linear, first = self._part(module)
        return None if linear.bias is None else linear.bias[first : first + self.spec.linears[module[1]][0]]

    def _part(self, module: ModuleKey) -> tuple[GroupLinear, int]:
        """The group of linears that a linear is a part of, and its first row there."""
        layer, name = module
        group = next(group for group, members in GROUPS.items() if name in members)
        before = GROUPS[group][: GROUPS[group].index(name)]
        linear: GroupLinear = getattr(self.layers[layer], group)
        return linear, sum(self.spec.linears[member][0] for member in before)

    def hash_weights(self) -> str:
        """sha256 over every base tensor's name and bytes; equal as long as no weight was written."""
        digest = hashlib.sha256()
        for name, buffer in self.buffers():
            digest.update(f"{name} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
            digest.update(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _attend(self, step: _Step, index: int, layer: DecoderLayer, x: Tensor) -> Tensor:
        spec = self.spec
        qkv = layer.qkv(x)
        add_adapters(qkv, x, step.batch, step.adapters, index, "qkv")
        heads = qkv.view(x.shape[0], spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        num_qk = spec.num_heads + spec.num_kv_heads
        qk, v = heads[:, :num_qk], heads[:, num_qk:]
        if layer.qk_norm is not None:
            qk = self._norm_heads(step.outside, qk, layer.qk_norm, index)
        qk = rope_ref(qk, step.cos, step.sin)
        q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
        mixed = step.plans[spec.windows[index]].run(q, k, v, step.kv.k[index], step.kv.v[index])
        out = layer.o(mixed)
        add_adapters(out, mixed, step.batch, step.adapters, index, "o")
        return out

    def _norm_heads(self, outside: OutsideSegments, qk: Tensor, weight: Tensor, layer: int) -> Tensor:
        """Queries and keys normed head by head. Shapes: qk [T, H + Hkv, D], weight [H + Hkv, D]."""
        heads, eps = self.spec.num_heads, self.spec.rms_eps
        if not outside.parts:
            return rms_norm_ref(qk, weight, eps)
        q = outside.norm(qk[:, :heads], weight[:heads], eps, (layer, "q_norm"))
        k = outside.norm(qk[:, heads:], weight[heads:], eps, (layer, "k_norm"))
        return torch.cat((q, k), dim=1)

    def _mlp(self, step: _Step, index: int, layer: DecoderLayer, x: Tensor) -> Tensor:
        gate_up = layer.gate_up(x)
        add_adapters(gate_up, x, step.batch, step.adapters, index, "gate_up")
        inner = silu_mul_ref(gate_up)
        out = layer.down(inner)
        add_adapters(out, inner, step.batch, step.adapters, index, "down")
        return out
