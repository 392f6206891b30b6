"""How the model asks for adapter factors: a lookup the engine's residency pool implements."""

from typing import Final, Protocol

from loraplex_server.kernels.lora_ref import GroupDelta

# Linears that share an input are computed as one matrix; an adapter's factors follow the same grouping.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


class AdapterLookup(Protocol):
    """Factors of the adapters that are resident now."""

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        """Factors of the adapter in ``slot`` for one group at one layer; None where it changes nothing."""
        ...


class NoAdapters:
    """The lookup of a model that serves its base alone."""

    def delta(self, slot: int, layer: int, group: str) -> GroupDelta | None:
        raise LookupError(f"no adapter is resident in slot {slot}")
