"""The order of bytes that the fused NF4 kernels read, and the way back to bitsandbytes' form.

Units of 64 rows x 64 k lie one behind the other, [row block][k block], each 2,048 bytes of codes and 64 float16 scales.
A unit's codes are four tiles of 16 rows; of a tile, lane 4*g + t of a warp reads 16 contiguous bytes, and its byte
4*q + 2*o + h is bitsandbytes' own byte of row 8*h + g and k = 16*q + 8*o + 2*t, + 1: exactly that lane's part of four
tensor-core fragments. Scales are absmax / (1.524605 * gain), ordered [g][tile][h]; gain is a power of two that keeps
them in float16's range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_server.kernels.nf4_ref import NF4_CODE
from loraplex_server.kernels.nf4_weight import Nf4FormatError, Nf4Weight

UNIT = 64
CODE_BYTES = 2048
UNIT_BYTES = CODE_BYTES + 128

# What the kernels' table of values is multiplied by (and the scales divided by): of all factors the one whose sixteen
# values lose least when they are rounded to bfloat16.
TABLE_GAIN = 1.524605
_LARGEST_SCALE = 2.0**12


@dataclass(frozen=True, eq=False)
class RepackedNf4:
    """One or more NF4 matrices stacked along N (q, k, v or gate and up), as the fused kernels read them.

    Shapes: data uint8 [ceil(N/64) * K/64 * 2176] with N the sum of the parts' rows; rows past N are zero.
    ``statistics`` are the parts' absmax tensors as bitsandbytes keeps them, on the host, so that nothing is lost.
    """

    data: Tensor
    gain: float
    num_in: int
    part_rows: tuple[int, ...]
    statistics: tuple[dict[str, Tensor], ...]

    @property
    def num_out(self) -> int:
        """Rows of all parts together: N."""
        return sum(self.part_rows)

    @property
    def num_row_blocks(self) -> int:
        """Blocks of 64 rows, the last one padded."""
        return -(-self.num_out // UNIT)

    @property
    def num_k_blocks(self) -> int:
        """Blocks of 64 along K."""
        return self.num_in // UNIT

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self.data.numel()

    def packed_rows(self) -> Tensor:
        """bitsandbytes' bytes of every row. Shape: uint8 [N, K/2]."""
        units = self.data.view(self.num_row_blocks, self.num_k_blocks, UNIT_BYTES)[..., :CODE_BYTES]
        # [row block, k block, tile, g, t, q, o, h] -> [row block, tile, h, g, k block, q, o, t]
        codes = units.reshape(self.num_row_blocks, self.num_k_blocks, 4, 8, 4, 4, 2, 2).permute(0, 2, 7, 3, 1, 5, 6, 4)
        return codes.reshape(self.num_row_blocks * UNIT, self.num_in // 2)[: self.num_out]

    def scale_rows(self) -> Tensor:
        """What each row's blocks are multiplied by: absmax as the kernels see it. Shape: float32 [N, K/64]."""
        units = self.data.view(self.num_row_blocks, self.num_k_blocks, UNIT_BYTES)[..., CODE_BYTES:]
        scales = units.contiguous().view(torch.float16)
        scales = scales.view(self.num_row_blocks, self.num_k_blocks, 8, 4, 2).permute(0, 3, 4, 2, 1)
        rows = scales.reshape(self.num_row_blocks * UNIT, self.num_k_blocks)[: self.num_out]
        return rows.float() * (TABLE_GAIN * self.gain)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The stacked matrix from the kernels' own scales (within 2**-11 of the definition). Shape: [N, K]."""
        table = torch.tensor(NF4_CODE, dtype=torch.float32, device=self.data.device)
        packed = self.packed_rows()
        values = table[torch.stack((packed >> 4, packed & 15), dim=-1).int()]
        values = values.view(self.num_out, self.num_k_blocks, UNIT) * self.scale_rows().unsqueeze(-1)
        return values.view(self.num_out, self.num_in).to(dtype)

    def unpack(self) -> tuple[Nf4Weight, ...]:
        """The parts in bitsandbytes' form, bit for bit as they were given to ``repack``."""
        parts = torch.split(self.packed_rows(), list(self.part_rows))
        device = self.data.device
        return tuple(
            Nf4Weight(
                packed=packed.reshape(-1),
                shape=(packed.shape[0], self.num_in),
                **{name: value.to(device) for name, value in statistics.items()},
            )
            for packed, statistics in zip(parts, self.statistics, strict=True)
        )


def repack(parts: Sequence[Nf4Weight]) -> RepackedNf4:
    """Stack matrices of equal K along N and order their bytes for the fused kernels, on the parts' device.

    Raises: Nf4FormatError if there is no part, the parts' K differ, or K is no multiple of 64.
    """
    if not parts:
        raise Nf4FormatError("nothing to repack")
    num_in = parts[0].shape[1]
    if num_in % UNIT or any(part.shape[1] != num_in for part in parts):
        raise Nf4FormatError(f"stacked matrices need one K, a multiple of {UNIT}; got {[p.shape for p in parts]}")
    num_out = sum(part.shape[0] for part in parts)
    row_blocks, k_blocks = -(-num_out // UNIT), num_in // UNIT
    packed = torch.cat([part.packed.view(part.shape[0], num_in // 2) for part in parts])
    absmax = torch.cat([part.block_absmax().view(part.shape[0], k_blocks) for part in parts])
    padding = row_blocks * UNIT - num_out
    packed = torch.nn.functional.pad(packed, (0, 0, 0, padding))
    absmax = torch.nn.functional.pad(absmax, (0, 0, 0, padding))

    largest = float(absmax.abs().max()) / TABLE_GAIN
    gain = 2.0 ** math.ceil(math.log2(largest / _LARGEST_SCALE)) if 0 < largest < math.inf else 1.0
    scales = (absmax / (TABLE_GAIN * gain)).to(torch.float16)

    data = torch.empty(row_blocks, k_blocks, UNIT_BYTES, dtype=torch.uint8, device=packed.device)
    codes = packed.view(row_blocks, 4, 2, 8, k_blocks, 4, 2, 4).permute(0, 4, 1, 3, 7, 5, 6, 2)
    data[..., :CODE_BYTES] = codes.reshape(row_blocks, k_blocks, CODE_BYTES)
    scales = scales.view(row_blocks, 4, 2, 8, k_blocks).permute(0, 4, 3, 1, 2).contiguous()
    data[..., CODE_BYTES:] = scales.view(torch.uint8).view(row_blocks, k_blocks, 128)
    return RepackedNf4(
        data=data.view(-1),
        gain=gain,
        num_in=num_in,
        part_rows=tuple(part.shape[0] for part in parts),
        statistics=tuple(part.host_statistics() for part in parts),
    )
