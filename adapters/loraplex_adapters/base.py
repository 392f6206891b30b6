"""What an adapter must know of its base model: which linears exist and their shapes."""

from collections.abc import Mapping
from dataclasses import dataclass

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS

ModuleKey = tuple[int, str]
"""(layer, linear name), for example (0, "q_proj")."""


@dataclass(frozen=True)
class BaseShape:
    """The base model as adapters see it.

    Shapes: ``linears`` maps each linear's name to (N out, K in), equal in all layers.
    ``fingerprint`` identifies the base's config and weights; an adapter stored for one base is refused on another.
    """

    model_type: str
    num_layers: int
    linears: Mapping[str, tuple[int, int]]
    vocab_size: int
    hidden_size: int
    fingerprint: str


def module_path(layer: int, linear: str) -> str:
    """The linear's path in the transformers model, the string that peft matches its patterns against."""
    block = "self_attn" if linear in ATTENTION_LINEARS else "mlp"
    return f"model.layers.{layer}.{block}.{linear}"
