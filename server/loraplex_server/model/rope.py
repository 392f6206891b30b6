"""Cosines and sines of every position, computed once and looked up each step."""

import torch
from torch import Tensor

from loraplex_server.model.spec import Rope

_FIRST_LENGTH = 4096


class RopeTable:
    """The rotary angles of a model, in its dtype; the table doubles when a longer sequence comes.

    Angles are float32 and cast at the end, as transformers does.
    """

    def __init__(self, rope: Rope, *, max_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32)
        self._scaling = rope.attention_scaling
        self._dtype = dtype
        self._device = device
        self._cos, self._sin = self._compute(min(max_tokens, _FIRST_LENGTH))

    def at(self, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of ``positions`` [T], all below ``num_positions``. Shapes: [T, 1, D / 2] each."""
        cos, sin = self.tables(num_positions)
        return cos.index_select(0, positions).unsqueeze(1), sin.index_select(0, positions).unsqueeze(1)

    def tables(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position below ``num_positions`` at least. Shapes: [P, D / 2] each."""
        if num_positions > self._cos.shape[0]:
            self._cos, self._sin = self._compute(1 << (num_positions - 1).bit_length())
        return self._cos, self._sin

    def _compute(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self._inv_freq
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        return cos.to(self._device, self._dtype), sin.to(self._device, self._dtype)
