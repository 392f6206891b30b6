"""The shapes of real models: speed depends on them, not on the weights' values."""

from pathlib import Path
from typing import Any, Final

from loraplex_adapters.base import BaseShape
from loraplex_server.model.spec import ModelSpec, read_config

_COMMON: Final[dict[str, Any]] = {"hidden_act": "silu", "max_position_embeddings": 8192}
_LLAMA: Final = _COMMON | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
_QWEN: Final = _COMMON | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "eos_token_id": 151645,
}

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "llama-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 128001,
    },
    "qwen2.5-7b": _QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": _QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": _QWEN
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
}
"""config.json by name."""


def config_of(shape: str) -> dict[str, Any]:
    """The config.json of a name in ``SHAPES``, or of the model in a folder. Raises: ModelError."""
    return SHAPES[shape] if shape in SHAPES else read_config(Path(shape))


def spec_of(shape: str) -> ModelSpec:
    """What a decoder of this shape computes."""
    return ModelSpec.from_config(config_of(shape))


def base_shape_of(shape: str) -> BaseShape:
    """The base as adapters see it; its fingerprint is made up."""
    spec = spec_of(shape)
    return BaseShape(spec.model_type, spec.num_layers, spec.linears, spec.vocab_size, spec.hidden_size, "00" * 32)
