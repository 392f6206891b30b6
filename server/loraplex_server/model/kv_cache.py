"""The paged key/value cache: plain tensors, written by the model, addressed by block tables."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, in blocks of ``block_size`` tokens.

    Shapes: k, v [layers, num_blocks, block_size, Hkv, D].
    """

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def num_blocks(self) -> int:
        return self.k.shape[1]

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def num_bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()
