"""How the model asks for what adapters change: a lookup that the engine's residency implements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from loraplex_adapters.base import ModuleKey
from loraplex_server.kernels.lora_ref import GroupDelta

# Linears that share an input are computed as one matrix; an adapter's factors follow the same grouping.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True, slots=True)
class VocabularyRows:
    """Rows of the embeddings or the head in place of the base's.

    Shapes: indices [n] int32 ascending, values [n, H]. ``size``: rows that the matrix has in all for this adapter.
    """

    indices: Tensor
    values: Tensor
    size: int


@dataclass(frozen=True, slots=True)
class OutsideParts:
    """What an adapter changes outside the linears of the layers.

    ``norms``: weights by module. ``embed``, ``head``: rows; their LoRA is a ``GroupDelta`` over a one-hot token, and over
    the last hidden state. ``vocab_size``: tokens that it can produce.
    """

    norms: Mapping[ModuleKey, Tensor]
    embed: VocabularyRows | None
    embed_lora: GroupDelta | None
    head: VocabularyRows | None
    head_lora: GroupDelta | None
    vocab_size: int


class AdapterLookup(Protocol):
    """What the adapters that are resident now change."""

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        """Factors of the adapter in ``slot`` for one group at one layer; None where it changes nothing."""
        ...

    def outside(self, slot: int) -> OutsideParts | None:
        """What the adapter in ``slot`` changes elsewhere; None for most."""
        ...


class NoAdapters:
    """The lookup of a model that serves its base alone."""

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        raise LookupError(f"no adapter is resident in slot {slot}")

    def outside(self, slot: int) -> OutsideParts | None:
        raise LookupError(f"no adapter is resident in slot {slot}")
