"""The names that PEFT gives to LoRA tensors, in all of its spellings."""

import re

from loraplex_adapters.base import ATTENTION_LINEARS, LINEARS, ModuleKey
from loraplex_adapters.errors import InvalidAdapter, UnsupportedAdapter

_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?layers\.(?P<layer>\d{1,6})\.(?P<block>self_attn|mlp)\.(?P<linear>[a-z_]{1,32})"
    r"\.lora_(?P<factor>A|B)(?:\.[A-Za-z0-9_-]{1,64})?\.weight"
)


def parse_tensor_name(name: str) -> tuple[ModuleKey, str]:
    """The module and the factor ("A" or "B") that a tensor of a PEFT file belongs to, in any of peft's spellings.

    Raises: UnsupportedAdapter for tensors of features that are not served, InvalidAdapter for all else.
    """
    if found := _TENSOR_NAME.fullmatch(name):
        layer, linear = int(found["layer"]), found["linear"]
        if linear in LINEARS and (linear in ATTENTION_LINEARS) == (found["block"] == "self_attn"):
            return (layer, linear), found["factor"]
    shown = name[:120]
    for mark, code, feature in (
        ("lora_magnitude_vector", "dora", "DoRA"),
        ("lora_embedding_", "embedding_lora", "LoRA on embeddings"),
        ("modules_to_save", "modules_to_save", "whole modules trained beside LoRA"),
        ("trainable_tokens_", "trainable_tokens", "trained token embeddings"),
        ("embed_tokens", "embedding_lora", "trained embeddings"),
        ("lm_head", "embedding_lora", "a trained output layer"),
        (".bias", "bias", "trained biases"),
    ):
        if mark in name:
            raise UnsupportedAdapter(f"Tensor {shown!r} belongs to {feature}, which cannot be served.", code=code)
    raise InvalidAdapter(
        f"Tensor {shown!r} matches no module of the base. LoRA is served on {', '.join(LINEARS)} of its layers.",
        code="unknown_module",
    )
