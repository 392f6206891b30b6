"""The decoder: weights of one base model, and the forward pass over a batch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraplex_adapters.base import BaseShape
from loraplex_server.kernels.activation_ref import silu_mul_ref
from loraplex_server.kernels.norm_ref import rms_norm_ref
from loraplex_server.kernels.rope_ref import rope_ref
from loraplex_server.model.adapters import AdapterLookup
from loraplex_server.model.attention import AttentionPlan
from loraplex_server.model.batch import Batch
from loraplex_server.model.kv_cache import KVCache
from loraplex_server.model.linear import DenseLinear, GroupLinear, add_adapters, num_bytes
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
        spec = self.spec
        return BaseShape(
            spec.model_type, spec.num_layers, spec.linears, spec.vocab_size, spec.hidden_size, self.fingerprint
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache, adapters: AdapterLookup) -> Tensor:
        """Run every token of ``batch``, writing its keys and values into ``kv``. Returns normed hidden states [T, H].

        Raises: whatever ``adapters`` raises for a slot that is not resident.
        """
        longest = max(batch.prefix_and_query_lens)
        cos, sin = self.rope.at(batch.positions, longest)
        plans = AttentionPlan.build_all(batch, block_size=kv.block_size, windows=self.spec.windows, dtype=self.dtype)
        step = _Step(batch, kv, adapters, plans, cos, sin)
        hidden = embedding(batch.token_ids, self.embed)
        for index, layer in enumerate(self.layers):
            hidden += self._attend(step, index, layer, rms_norm_ref(hidden, layer.input_norm, self.spec.rms_eps))
            hidden += self._mlp(step, index, layer, rms_norm_ref(hidden, layer.post_norm, self.spec.rms_eps))
        return rms_norm_ref(hidden, self.final_norm, self.spec.rms_eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token. Shapes: hidden [R, H] as ``forward`` returns it -> [R, V] float32."""
        return self.scores(hidden).float()

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
            qk = rms_norm_ref(qk, layer.qk_norm, spec.rms_eps)
        qk = rope_ref(qk, step.cos, step.sin)
        q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
        mixed = step.plans[spec.windows[index]].run(q, k, v, step.kv.k[index], step.kv.v[index])
        out = layer.o(mixed)
        add_adapters(out, mixed, step.batch, step.adapters, index, "o")
        return out

    def _mlp(self, step: _Step, index: int, layer: DecoderLayer, x: Tensor) -> Tensor:
        gate_up = layer.gate_up(x)
        add_adapters(gate_up, x, step.batch, step.adapters, index, "gate_up")
        inner = silu_mul_ref(gate_up)
        out = layer.down(inner)
        add_adapters(out, inner, step.batch, step.adapters, index, "down")
        return out
