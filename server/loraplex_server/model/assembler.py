"""How tensors that come one by one become the layers of a decoder, quantized as they come."""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from loraplex_server.kernels.nf4 import Nf4Gemm, Nf4Weight
from loraplex_server.model.adapters import GROUPS
from loraplex_server.model.decoder import Decoder, DecoderLayer
from loraplex_server.model.linear import DenseLinear, GroupLinear, Nf4Linear
from loraplex_server.model.quantized import Quantization, nf4_tensor_names, read_nf4
from loraplex_server.model.spec import ModelSpec
from loraplex_server.model.tensor_names import EMBED, HEAD, NORM, linear_path


class TensorSource(Protocol):
    """Hands out tensors on the device, each once, in the order of ``tensor_shapes``."""

    @property
    def names(self) -> Collection[str]: ...

    def take(self, name: str) -> Tensor: ...


class Assembler:
    """Builds the decoder of one source.

    NF4 weights stay packed on a GPU that computes in 16 bits. Elsewhere they are kept expanded: rounded through NF4,
    then held in the compute dtype, because packed codes would be multiplied slowly. The values are the same.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: TensorSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization,
    ) -> None:
        self._spec = spec
        self._source = source
        self._names = frozenset(source.names)
        self._dtype = dtype
        # What a checkpoint that was quantized before left dense stays dense.
        self._quantize = quantization == "nf4" and not any(name.endswith(".absmax") for name in self._names)
        self._keep_packed = device.type == "cuda" and dtype.itemsize == 2

    def build(self, fingerprint: str) -> Decoder:
        """Take every tensor of the source. Raises: BadCheckpoint."""
        spec = self._spec
        vocab = (spec.vocab_size, spec.hidden_size)
        embed = self._expanded(self._stored(EMBED, vocab))
        layers = tuple(self._layer(index) for index in range(spec.num_layers))
        norm = self._vector(NORM)
        head = embed if spec.tie_word_embeddings else self._expanded(self._stored(HEAD, vocab))
        return Decoder(spec, embed=embed, layers=layers, norm=norm, head=DenseLinear(head), fingerprint=fingerprint)

    def _layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}."
        return DecoderLayer(
            input_norm=self._vector(prefix + "input_layernorm.weight"),
            qk_norm=self._qk_norm(prefix + "self_attn.") if self._spec.qk_norm else None,
            post_norm=self._vector(prefix + "post_attention_layernorm.weight"),
            qkv=self._group(index, "qkv"),
            o=self._group(index, "o"),
            gate_up=self._group(index, "gate_up"),
            down=self._group(index, "down"),
        )

    def _qk_norm(self, prefix: str) -> Tensor:
        q, k = self._vector(prefix + "q_norm.weight"), self._vector(prefix + "k_norm.weight")
        return torch.cat((q.expand(self._spec.num_heads, -1), k.expand(self._spec.num_kv_heads, -1)))

    def _group(self, layer: int, group: str) -> GroupLinear:
        parts, biases = [], []
        for linear in GROUPS[group]:
            path = linear_path(layer, linear)
            parts.append(self._linear(path + ".weight", self._spec.linears[linear]))
            if self._spec.has_bias(linear):
                biases.append(self._vector(path + ".bias"))
        bias = torch.cat(biases) if biases else None
        packed = tuple(part for part in parts if isinstance(part, Nf4Weight))
        if len(packed) == len(parts):
            return Nf4Linear(Nf4Gemm(packed), bias)
        # Also where a checkpoint left one part of a group unquantized.
        expanded = [self._expanded(part) for part in parts]
        return DenseLinear(expanded[0] if len(expanded) == 1 else torch.cat(expanded), bias)

    def _linear(self, name: str, shape: tuple[int, int]) -> Tensor | Nf4Weight:
        """A weight as it will be kept: packed, or in the compute dtype."""
        part = self._stored(name, shape)
        if self._quantize and isinstance(part, Tensor):
            part = Nf4Weight.quantize(part)
        return part if self._keep_packed else self._expanded(part)

    def _stored(self, name: str, shape: tuple[int, int]) -> Tensor | Nf4Weight:
        """A matrix as the source stores it."""
        names = nf4_tensor_names(name, self._names)
        return self._source.take(name) if len(names) == 1 else read_nf4(names, self._source.take, shape)

    def _expanded(self, part: Tensor | Nf4Weight) -> Tensor:
        return part.to(self._dtype) if isinstance(part, Tensor) else part.dequantize(self._dtype)

    def _vector(self, name: str) -> Tensor:
        return self._source.take(name).to(self._dtype)
