"""The linears of a decoder layer, fused by the input they share, and the adapters added to them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor
from torch.nn.functional import linear

from loraplex_server.kernels.lora_ref import lora_add_ref
from loraplex_server.kernels.nf4 import Nf4Weight
from loraplex_server.kernels.nf4_ref import nf4_linear_ref
from loraplex_server.model.adapters import AdapterLookup
from loraplex_server.model.batch import Batch


class GroupLinear(Protocol):
    """The weights of one fused group, applied as one linear."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias``. Shapes: x [T, K] -> [T, N], the group's parts side by side."""
        ...

    def buffers(self) -> Mapping[str, Tensor]:
        """Every tensor that holds the base's weights, by name."""
        ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Plain weights, or NF4 weights held expanded in the compute dtype. Shapes: weight [N, K], bias [N]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def buffers(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})


@dataclass(frozen=True, slots=True)
class Nf4Linear:
    """Packed NF4 weights, one matrix a part: each was quantized alone, with its own double-quantization offset.

    Shapes: parts [N_i, K], bias [sum of N_i].
    """

    parts: tuple[Nf4Weight, ...]
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        num_out = sum(part.shape[0] for part in self.parts)
        out = x.new_empty(x.shape[0], num_out)
        start = 0
        for part in self.parts:
            stop = start + part.shape[0]
            out[:, start:stop] = nf4_linear_ref(x, part)
            start = stop
        return out if self.bias is None else out.add_(self.bias)

    def buffers(self) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, part in enumerate(self.parts):
            values = {field.name: getattr(part, field.name) for field in fields(part)}
            found |= {f"{index}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
        return found | ({} if self.bias is None else {"bias": self.bias})


def add_adapters(out: Tensor, x: Tensor, batch: Batch, adapters: AdapterLookup, layer: int, group: str) -> None:
    """Add each segment's adapter delta of ``group`` at ``layer`` to ``out`` [T, N], in place; x [T, K]."""
    found = ((s.start, s.stop, adapters.delta(s.slot, layer, group)) for s in batch.segments)
    segments = [(start, stop, delta) for start, stop, delta in found if delta is not None]
    if segments:
        lora_add_ref(out, x, segments)
