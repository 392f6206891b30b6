"""A config.json that says everything itself, read without transformers, whose import takes seconds at every start.

Only what cannot be read in two ways is taken: every value that transformers has a default for must be there, and of
rotary embeddings the plain ones and Llama 3's. Everything else, and every odd value, is left to transformers.
"""

import math
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

_SIZES: Final = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_LLAMA3: Final = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def plain_config(raw: dict[str, Any]) -> SimpleNamespace | None:
    """The attributes of transformers' config that a ``ModelSpec`` is made of; None where only transformers knows them."""
    family = raw.get("model_type")
    if any(type(raw.get(name)) is not int or raw[name] <= 0 for name in _SIZES):
        return None
    if "partial_rotary_factor" in raw or raw["hidden_size"] % raw["num_attention_heads"]:
        return None
    if type(raw.get("rms_norm_eps")) is not float or type(raw.get("tie_word_embeddings")) is not bool:
        return None
    if raw.get("hidden_act") != "silu" or "eos_token_id" not in raw:
        return None
    if any(type(raw.get(name, False)) is not bool for name in ("attention_bias", "mlp_bias", "use_sliding_window")):
        return None
    head_dim = raw.get("head_dim")
    if family == "qwen3" and head_dim is None:
        return None
    if head_dim is not None and (type(head_dim) is not int or head_dim <= 0):
        return None
    rope, windows = _rope_parameters(raw), _windows(raw)
    if rope is None or windows is None:
        return None
    return SimpleNamespace(
        **{name: raw[name] for name in _SIZES},
        model_type=family,
        head_dim=head_dim,
        rms_norm_eps=raw["rms_norm_eps"],
        tie_word_embeddings=raw["tie_word_embeddings"],
        hidden_act="silu",
        eos_token_id=raw["eos_token_id"],
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        rope_parameters=rope,
        **windows,
    )


def llama3_inv_freq(parameters: dict[str, Any], head_dim: int) -> Tensor:
    """Llama 3.1's inverse frequencies: long waves stretched by ``factor``, short ones kept, and between the two a mean
    of both. Shape: [D / 2]. The same bits as transformers' ``_compute_llama3_parameters``."""
    factor, low, high, length = (parameters[name] for name in _LLAMA3)
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (parameters["rope_theta"] ** steps)
    waves = 2 * math.pi / inv_freq
    stretched = torch.where(waves > length / low, inv_freq / factor, inv_freq)
    share = (length / waves - low) / (high - low)
    mean = (1 - share) * stretched / factor + share * stretched
    between = (waves >= length / high) & (waves <= length / low)
    return torch.where(between, mean, stretched)


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any] | None:
    """``rope_parameters`` as transformers 5 writes them, or the two older fields."""
    given = raw.get("rope_parameters")
    if given is None:
        scaling = raw.get("rope_scaling")
        if "rope_theta" not in raw or not isinstance(scaling, dict | None):
            return None
        given = {"rope_type": "default", **(scaling or {}), "rope_theta": raw["rope_theta"]}
    elif not isinstance(given, dict) or "rope_theta" in raw or "rope_scaling" in raw:
        return None
    wanted = {"rope_type", "rope_theta"}
    if given.get("rope_type") == "llama3":
        wanted |= set(_LLAMA3)
    elif given.get("rope_type") != "default":
        return None
    numbers = wanted - {"rope_type"}
    if set(given) != wanted or any(type(given[name]) not in (int, float) or given[name] <= 0 for name in numbers):
        return None
    return dict(given)


def _windows(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The fields about sliding windows; None where a rule or a default decides."""
    if raw["model_type"] == "llama":
        return {"sliding_window": None}
    if raw["model_type"] == "mistral":
        window = raw.get("sliding_window", 0)
        return {"sliding_window": window} if window is None or (type(window) is int and window > 0) else None
    if raw.get("use_sliding_window", False) or raw.get("layer_types") is not None:
        return None
    return {"sliding_window": None, "layer_types": ["full_attention"] * raw["num_hidden_layers"]}
