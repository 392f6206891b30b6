"""One matrix in bitsandbytes' NF4 form."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from loraplex_server.kernels.nf4_quantize import can_quantize, quantize
from loraplex_server.kernels.nf4_ref import (
    BLOCKSIZE,
    NESTED_BLOCKSIZE,
    NF4_CODE,
    absmax_ref,
    dequantize_nf4_ref,
)


class Nf4FormatError(ValueError):
    """The tensors given do not form one NF4 matrix."""


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A [N, K] matrix as bitsandbytes quantizes it: 4-bit NF4 codes in blocks of 64 along the flattened matrix.

    Shapes: packed uint8 [N*K / 2] (high nibble first); either absmax float32 [N*K / 64], or, with double quantization,
    absmax_codes uint8 [N*K / 64], nested_absmax float32 [ceil(N*K / 64 / 256)], nested_code float32 [256] and the
    float32 scalar offset. Counts round up where N*K is no multiple.
    Raises: Nf4FormatError when dtypes or sizes disagree with ``shape``.
    """

    packed: Tensor
    shape: tuple[int, int]
    absmax: Tensor | None = None
    absmax_codes: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        num_values = self.shape[0] * self.shape[1]
        num_blocks = -(-num_values // BLOCKSIZE)
        _check("packed", self.packed, torch.uint8, -(-num_values // 2))
        nested = (self.absmax_codes, self.nested_absmax, self.nested_code, self.offset)
        if self.absmax is not None:
            if any(part is not None for part in nested):
                raise Nf4FormatError("an NF4 matrix has either absmax or the nested tensors, not both")
            _check("absmax", self.absmax, torch.float32, num_blocks)
            return
        _check("absmax_codes", self.absmax_codes, torch.uint8, num_blocks)
        _check("nested_absmax", self.nested_absmax, torch.float32, -(-num_blocks // NESTED_BLOCKSIZE))
        _check("nested_code", self.nested_code, torch.float32, 256)
        _check("offset", self.offset, torch.float32, 1)

    @classmethod
    def quantize(cls, weight: Tensor, *, double_quant: bool = True) -> Nf4Weight:
        """Quantize a [N, K] float matrix as bitsandbytes does, blocksize 64.

        Raises: Nf4FormatError if ``weight`` is not a matrix.
        """
        if weight.ndim != 2:
            raise Nf4FormatError(f"NF4 quantizes matrices; got shape {tuple(weight.shape)}")
        if double_quant and can_quantize(weight):
            return cls(shape=(weight.shape[0], weight.shape[1]), **quantize(weight)._asdict())
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.contiguous(), blocksize=BLOCKSIZE, compress_statistics=double_quant, quant_type="nf4"
        )
        return cls.from_quant_state(packed, state)

    @classmethod
    def from_quant_state(cls, packed: Tensor, state: Any) -> Nf4Weight:
        """Take over a bitsandbytes ``Params4bit``'s data and its ``QuantState``.

        Raises: Nf4FormatError for fp4, other block sizes or a packed dtype that is not one byte wide.
        """
        if state.quant_type != "nf4" or state.blocksize != BLOCKSIZE:
            raise Nf4FormatError(f"expected nf4 in blocks of {BLOCKSIZE}, got {state.quant_type}/{state.blocksize}")
        num_out, num_in = state.shape
        packed = packed.reshape(-1)
        if not state.nested:
            return cls(packed=packed, shape=(num_out, num_in), absmax=state.absmax.float())
        if state.state2.blocksize != NESTED_BLOCKSIZE:
            raise Nf4FormatError(f"expected nested blocks of {NESTED_BLOCKSIZE}, got {state.state2.blocksize}")
        return cls(
            packed=packed,
            shape=(num_out, num_in),
            absmax_codes=state.absmax.reshape(-1),
            nested_absmax=state.state2.absmax.float(),
            nested_code=state.state2.code.float().to(packed.device),
            offset=state.offset.float(),
        )

    @property
    def nested(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The double-quantized statistics: codes, nested absmax, nested code table, offset.

        Raises: Nf4FormatError if absmax is kept plain.
        """
        codes, scales, table, offset = self.absmax_codes, self.nested_absmax, self.nested_code, self.offset
        if codes is None or scales is None or table is None or offset is None:
            raise Nf4FormatError("this NF4 matrix has a plain absmax")
        return codes, scales, table, offset

    @property
    def is_nested(self) -> bool:
        """Whether absmax is itself quantized (double quantization)."""
        return self.absmax is None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of this form."""
        return sum(part.numel() * part.element_size() for part in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.packed.device

    def block_absmax(self) -> Tensor:
        """The float32 absmax of every block. Shape: [ceil(N*K / 64)]."""
        return absmax_ref(self)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The matrix in ``dtype``, exactly as ``dequantize_nf4_ref`` defines it. Shape: [N, K]."""
        return dequantize_nf4_ref(self, dtype)

    def host_statistics(self) -> dict[str, Tensor]:
        """Every tensor but the codes, on the host, by field name."""
        return {name: part.cpu() for name, part in self.tensors().items() if name != "packed"}

    def quant_state(self, dtype: torch.dtype) -> Any:
        """The bitsandbytes ``QuantState`` that, with ``packed``, stands for this matrix in ``dtype``."""
        from bitsandbytes.functional import QuantState

        code = torch.tensor(NF4_CODE, dtype=torch.float32, device=self.device)
        state = QuantState(
            absmax=self.absmax if self.absmax is not None else self.absmax_codes,
            shape=torch.Size(self.shape),
            code=code,
            blocksize=BLOCKSIZE,
            quant_type="nf4",
            dtype=dtype,
        )
        if self.is_nested:
            _, scales, table, offset = self.nested
            state.offset, state.nested = offset, True
            state.state2 = QuantState(absmax=scales, code=table, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
        return state

    def to(self, device: torch.device | str) -> Nf4Weight:
        """The same matrix on another device."""
        moved = {name: part.to(device) for name, part in self.tensors().items()}
        return Nf4Weight(shape=self.shape, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of this form by its field's name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in found.items() if isinstance(part, Tensor)}


def _check(name: str, part: Tensor | None, dtype: torch.dtype, count: int) -> None:
    if part is None:
        raise Nf4FormatError(f"an NF4 matrix needs {name}")
    if part.dtype != dtype or part.numel() != count:
        raise Nf4FormatError(f"{name} must be {dtype} with {count} values, got {part.dtype} with {part.numel()}")
