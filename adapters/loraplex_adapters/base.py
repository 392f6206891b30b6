"""What an adapter must know of its base model: which modules exist and their shapes."""

from collections.abc import Mapping
from dataclasses import dataclass

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS
# Linears that some trainers stack into one matrix, in the order of its rows.
FUSED_LINEARS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
QK_NORMS = ("q_norm", "k_norm")

ModuleKey = tuple[int, str]
"""(layer, module name), for example (0, "q_proj"); layer -1 for the modules that stand outside the layers."""

EMBED: ModuleKey = (-1, "embed_tokens")
HEAD: ModuleKey = (-1, "lm_head")
FINAL_NORM: ModuleKey = (-1, "norm")

_OUTSIDE = {EMBED: "model.embed_tokens", HEAD: "lm_head", FINAL_NORM: "model.norm"}
_IN_ATTENTION = (*ATTENTION_LINEARS, "qkv_proj", *QK_NORMS)


@dataclass(frozen=True)
class BaseShape:
    """The base model as adapters see it.

    Shapes: ``linears`` maps each linear's name to (N out, K in), equal in all layers.
    ``fingerprint`` identifies the base's config and weights; an adapter stored for one base is refused on another.
    ``biases``: the linears that add a bias. ``qk_norm_size``: of the norms of queries and keys, 0 where there are none.
    """

    model_type: str
    num_layers: int
    linears: Mapping[str, tuple[int, int]]
    vocab_size: int
    hidden_size: int
    fingerprint: str
    biases: frozenset[str] = frozenset()
    qk_norm_size: int = 0
    tied_embeddings: bool = False

    def norm_size(self, module: ModuleKey) -> int:
        """Elements of a norm's weight; 0 if the base has no such norm."""
        layer, name = module
        if module == FINAL_NORM:
            return self.hidden_size
        if not 0 <= layer < self.num_layers:
            return 0
        return self.hidden_size if name in LAYER_NORMS else self.qk_norm_size if name in QK_NORMS else 0


def module_path(layer: int, name: str) -> str:
    """The module's path in the transformers model, the string that peft matches its patterns against."""
    if (layer, name) in _OUTSIDE:
        return _OUTSIDE[layer, name]
    if name in LAYER_NORMS:
        return f"model.layers.{layer}.{name}"
    block = "self_attn" if name in _IN_ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{name}"


def fused_parts(module: ModuleKey, base: BaseShape) -> list[tuple[ModuleKey, int, int]]:
    """A fused linear's parts, each with its first row and the row after its last; the linear itself if it is none."""
    layer, name = module
    found, row = [], 0
    for part in FUSED_LINEARS.get(name, ()):
        size = base.linears[part][0]
        found.append(((layer, part), row, row + size))
        row += size
    return found
