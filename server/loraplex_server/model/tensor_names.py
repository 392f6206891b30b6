"""The tensors that a checkpoint of a model consists of: names, shapes and the order in which they are taken."""

from typing import Final

from loraplex_server.model.adapters import GROUPS
from loraplex_server.model.checkpoint import Checkpoint
from loraplex_server.model.errors import BadCheckpoint
from loraplex_server.model.quantized import nf4_tensor_names
from loraplex_server.model.spec import ModelSpec

EMBED: Final = "model.embed_tokens.weight"
NORM: Final = "model.norm.weight"
HEAD: Final = "lm_head.weight"

_NAMED_IN_ERRORS: Final = 5


def linear_path(layer: int, linear: str) -> str:
    """The path of a linear in checkpoints, without ``.weight``."""
    block = "mlp" if linear in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{linear}"


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, in the order in which it is assembled."""
    shapes: dict[str, tuple[int, ...]] = {EMBED: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (spec.hidden_size,)
        if spec.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (spec.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (spec.head_dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (spec.hidden_size,)
        for linears in GROUPS.values():
            for linear in linears:
                path = linear_path(layer, linear)
                shapes[path + ".weight"] = spec.linears[linear]
                if spec.has_bias(linear):
                    shapes[path + ".bias"] = spec.linears[linear][:1]
    shapes[NORM] = (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        shapes[HEAD] = (spec.vocab_size, spec.hidden_size)
    return shapes


def stored_names(spec: ModelSpec, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors to read, in order; a quantized weight is followed by the tensors of its quantization.

    Raises: BadCheckpoint for missing, unexpected or misshapen tensors, by name.
    """
    stored, shapes = checkpoint.entries, tensor_shapes(spec)
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise BadCheckpoint(f"the checkpoint lacks {_some(missing)}")
    parts = {name: nf4_tensor_names(name, stored) for name in shapes}
    names = tuple(part for group in parts.values() for part in group)
    # A tied head is the embedding again; old exports carry rotary buffers that follow from the config.
    known = {*names, HEAD} if spec.tie_word_embeddings else {*names}
    unexpected = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if unexpected:
        raise BadCheckpoint(f"a {spec.model_type} of this config has no {_some(unexpected)}")
    for name, shape in shapes.items():
        entry = stored[name]
        if len(parts[name]) > 1:
            continue
        if entry.shape != shape:
            raise BadCheckpoint(f"{name} has shape {list(entry.shape)}, the config says {list(shape)}")
        if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            raise BadCheckpoint(f"{name} is {entry.dtype}; served are bfloat16, float16 and float32")
    return names


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    return ", ".join(names[:_NAMED_IN_ERRORS]) + more
