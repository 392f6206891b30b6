"""The names that trainers give to an adapter's tensors, in all of their spellings.

peft itself has changed them over the years, and what wraps a model while it is trained (compilation, FSDP, data
parallelism, activation checkpoints) leaves its own words in them.
"""

import re

from loraplex_adapters.base import (
    ATTENTION_LINEARS,
    EMBED,
    FUSED_LINEARS,
    HEAD,
    LAYER_NORMS,
    LINEARS,
    QK_NORMS,
    ModuleKey,
)
from loraplex_adapters.errors import InvalidAdapter, UnsupportedAdapter

A, B, B_BIAS, MAGNITUDE = "A", "B", "B.bias", "magnitude"
BIAS, WEIGHT, SAVED, TOKENS, ORIGINAL = "bias", "weight", "saved weight", "tokens", "original"
"""The parts of a module that a file can hold: LoRA's two factors and the bias of the second, DoRA's magnitude, a trained
bias, a trained weight (also under an older name, which a file can hold beside the newer), trained rows of it, and a copy
of what the base had there, which nothing needs."""

TensorKey = tuple[ModuleKey, str]
"""A module and which of its parts."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_MODULE = re.compile(
    r"(?:module\.)*(?:base_model\.model\.)?(?:model\.)?"
    r"(?:layers\.(?P<layer>0|[1-9]\d{0,5})\.(?:(?P<block>self_attn|mlp)\.)?(?P<inner>[a-z_]{1,32})|(?P<outer>embed_tokens|lm_head|norm))"
    r"\.(?P<rest>.+)"
)
_NAME = r"(?:\.[A-Za-z0-9_-]{1,64})?"
_PARTS = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (rf"lora_A{_NAME}\.weight", A),
        (rf"lora_B{_NAME}\.weight", B),
        (rf"lora_embedding_A{_NAME}", "embedding A"),
        (rf"lora_embedding_B{_NAME}", "embedding B"),
        (rf"lora_B{_NAME}\.bias", B_BIAS),
        (rf"lora_magnitude_vector{_NAME}(?:\.weight)?", MAGNITUDE),
        (rf"(?:base_layer\.|modules_to_save{_NAME}\.)?bias", BIAS),
        (r"(?:(?:token_adapter\.)?base_layer\.)?weight", WEIGHT),
        (rf"modules_to_save{_NAME}\.weight", SAVED),
        (rf"(?:token_adapter\.)?trainable_tokens_delta{_NAME}", TOKENS),
        (rf"(?:original_module\.weight|(?:token_adapter\.)?trainable_tokens_original{_NAME})", ORIGINAL),
    )
)


def parse_tensor_name(name: str) -> TensorKey:
    """The module and its part that a tensor of a PEFT file holds, in any known spelling.

    Raises: UnsupportedAdapter for parts that are not served, InvalidAdapter for all else.
    """
    plain = ".".join(word for word in name.split(".") if word not in _WRAPPERS)
    found = _MODULE.fullmatch(plain)
    module = _module(found) if found else None
    if found is None or module is None:
        raise _unknown(name)
    part = next((part for pattern, part in _PARTS if pattern.fullmatch(found["rest"])), None)
    if part is None or not _fits(module, part):
        raise _unknown(name)
    if part in (WEIGHT, SAVED) and module[1] in (*LINEARS, *FUSED_LINEARS):
        raise UnsupportedAdapter(
            f"Tensor {name[:120]!r} is a whole trained linear; whole modules are served for lm_head, embed_tokens and norms. "
            f"Train {module[1]} by LoRA instead.",
            code="modules_to_save",
        )
    return module, {"embedding A": A, "embedding B": B}.get(part, part)


def _module(found: re.Match[str]) -> ModuleKey | None:
    if outer := found["outer"]:
        return (-1, outer)
    layer, block, inner = int(found["layer"]), found["block"], found["inner"]
    if inner in LAYER_NORMS:
        return (layer, inner) if block is None else None
    if inner in (*ATTENTION_LINEARS, "qkv_proj", *QK_NORMS):
        return (layer, inner) if block == "self_attn" else None
    if inner in LINEARS or inner == "gate_up_proj":
        return (layer, inner) if block == "mlp" else None
    return None


def _fits(module: ModuleKey, part: str) -> bool:
    """Whether such a module can have such a part."""
    if module == EMBED:
        return part in ("embedding A", "embedding B", MAGNITUDE, WEIGHT, SAVED, TOKENS, ORIGINAL)
    if module == HEAD:
        return part in (A, B, B_BIAS, MAGNITUDE, WEIGHT, SAVED, TOKENS, ORIGINAL)
    if module[1] in (*LINEARS, *FUSED_LINEARS):
        return part in (A, B, B_BIAS, MAGNITUDE, BIAS, WEIGHT, SAVED)
    return part in (WEIGHT, SAVED)


def _unknown(name: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"Tensor {name[:120]!r} matches no module of the base. Served are LoRA on {', '.join(LINEARS)}, embed_tokens and "
        "lm_head, their biases, and whole embed_tokens, lm_head and norms.",
        code="unknown_module",
    )
