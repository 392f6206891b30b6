"""The linears of a decoder layer, fused by the input they share, and the adapters added to them."""

from collections.abc import Iterator
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraplex_server.kernels.blocked import block, blocked_linear, can_block
from loraplex_server.kernels.lora_ref import lora_add_ref
from loraplex_server.kernels.nf4 import Nf4Gemm, RepackedNf4
from loraplex_server.kernels.nf4_dense import dequantize
from loraplex_server.kernels.threads import one_thread
from loraplex_server.model.adapters import AdapterLookup
from loraplex_server.model.batch import Batch

# Rows of a step up to which a CPU's adapters take less time on one thread.
_FEW_ROWS: Final = 32


class GroupLinear(Protocol):
    """The weights of one fused group, applied as one linear. ``bias`` [N] or None."""

    @property
    def bias(self) -> Tensor | None: ...

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias``. Shapes: x [T, K], out [T, N] contiguous -> [T, N], the group's parts side by side."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """Every tensor that holds the base's weights, in its plain layout; may cost a copy."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of W as they multiply, dense. May cost a copy of all of W."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of these tensors on the device."""
        ...


class DenseLinear:
    """Plain weights, or NF4 weights held expanded in the compute dtype; on a CPU in its fastest layout.

    Shapes: weight [N, K], bias [N].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._blocked = can_block(weight)
        self.weight = block(weight) if self._blocked else weight
        self.bias = bias

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self._blocked:
            found = blocked_linear(x, self.weight, self.bias)
            return found if out is None else out.copy_(found)
        if out is None:
            return linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.weight) + (0 if self.bias is None else num_bytes(self.bias))

    def rows(self, start: int, stop: int) -> Tensor:
        return (self.weight.to_dense() if self._blocked else self.weight)[start:stop]

    def buffers(self) -> Iterator[Tensor]:
        yield self.weight.to_dense() if self._blocked else self.weight
        if self.bias is not None:
            yield self.bias


class Nf4Linear:
    """Packed NF4 weights; each part was quantized alone, with its own double-quantization offset. bias: [N]."""

    def __init__(self, gemm: Nf4Gemm, bias: Tensor | None = None) -> None:
        self._gemm = gemm
        self.bias = bias

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._gemm(x, out, bias=self.bias)

    @property
    def repacked(self) -> RepackedNf4 | None:
        """The weights as the fused kernels read them; None where those do not run."""
        return self._gemm.repacked

    @property
    def num_bytes(self) -> int:
        return self._gemm.num_bytes + (0 if self.bias is None else num_bytes(self.bias))

    def rows(self, start: int, stop: int) -> Tensor:
        packed = self._gemm.repacked
        if packed is not None:
            dense = torch.empty(packed.num_out, packed.num_in, dtype=torch.bfloat16, device=packed.data.device)
            dequantize(packed, dense)
            return dense[start:stop]
        found = []
        for part in self._gemm.unpack():
            if start < part.shape[0] and stop > 0:
                found.append(part.dequantize()[max(start, 0) : stop])
            start, stop = start - part.shape[0], stop - part.shape[0]
        return torch.cat(found)

    def buffers(self) -> Iterator[Tensor]:
        yield from self._gemm.tensors()
        if self.bias is not None:
            yield self.bias


def add_adapters(out: Tensor, x: Tensor, batch: Batch, adapters: AdapterLookup, layer: int, group: str) -> None:
    """Add each segment's adapter delta of ``group`` at ``layer`` to ``out`` [T, N], in place; x [T, K]."""
    if not batch.segments:
        return
    found = ((s.start, s.stop, adapters.delta(s.slot, layer, group)) for s in batch.segments)
    segments = [(start, stop, delta) for start, stop, delta in found if delta is not None]
    if not segments:
        return
    if x.device.type == "cpu" and x.shape[0] <= _FEW_ROWS:
        with one_thread():
            lora_add_ref(out, x, segments)
    else:
        lora_add_ref(out, x, segments)


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()
