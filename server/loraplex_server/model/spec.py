"""The mathematics of a model, read once from its config.json and frozen."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from loraplex_server.model.errors import BadCheckpoint, ModelNotFound, UnsupportedModel
from loraplex_server.model.plain_config import llama3_inv_freq, plain_config

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")

# Rope types whose frequencies are the same at every length. "dynamic" is one of them up to max_position_embeddings.
_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn", "dynamic")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary frequencies: D / 2 inverse frequencies, and the factor on cosine and sine (yarn's attention scaling)."""

    inv_freq: tuple[float, ...]
    attention_scaling: float


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What one decoder computes. ``windows`` gives each layer's sliding window in tokens, None = full attention."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    context_length: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelSpec":
        """Read config.json and generation_config.json of ``folder``. Raises: ModelError."""
        raw = read_config(folder)
        generation = folder / "generation_config.json"
        eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        return cls.from_config(raw, eos_token_id=eos)

    @classmethod
    def from_config(cls, raw: dict[str, Any], *, eos_token_id: int | list[int] | None = None) -> "ModelSpec":
        """Read the dictionary of a config.json; ``eos_token_id`` is generation_config's and goes before the config's.

        Raises: UnsupportedModel for other families, activations, rope types; BadCheckpoint for values that do not fit.
        """
        config = _config(raw)
        family = str(config.model_type)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if config.num_attention_heads % config.num_key_value_heads:
            raise BadCheckpoint("num_attention_heads is not a multiple of num_key_value_heads")
        attention_bias = bool(getattr(config, "attention_bias", False))
        eos = config.eos_token_id if eos_token_id is None else eos_token_id
        return cls(
            model_type=family,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=config.vocab_size,
            rms_eps=config.rms_norm_eps,
            rope=_rope(config, head_dim),
            windows=_windows(config),
            tie_word_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=family in ("llama", "qwen3") and attention_bias,
            mlp_bias=family == "llama" and bool(config.mlp_bias),
            qk_norm=family == "qwen3",
            max_position_embeddings=config.max_position_embeddings,
            context_length=_context_length(config),
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shape (N, K) of each linear of one layer, by the name it has in checkpoints and adapters."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (self.q_size, hidden),
            "k_proj": (self.kv_size, hidden),
            "v_proj": (self.kv_size, hidden),
            "o_proj": (hidden, self.q_size),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    def has_bias(self, linear: str) -> bool:
        """Whether ``linear`` (a key of ``linears``) adds a bias."""
        if linear in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.o_bias if linear == "o_proj" else self.mlp_bias

    def maths_digest(self) -> str:
        """sha256 over every field that changes what the model computes (so not the end-of-text ids or lengths)."""
        fields = asdict(self)
        for name in ("eos_token_ids", "max_position_embeddings", "context_length"):
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The dictionary in ``folder``/config.json. Raises: ModelNotFound, BadCheckpoint."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder} holds no config.json")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise BadCheckpoint(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadCheckpoint(f"{path} is not a JSON object")
    return raw


def _config(raw: dict[str, Any]) -> Any:
    """The config's attributes as transformers names them: from the file alone where it leaves nothing open, else
    transformers' own reading, with its defaults and its names for what older configs called otherwise."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModel(f"model_type {family!r} is not served; supported: {', '.join(FAMILIES)}")
    plain = plain_config(raw)
    if plain is not None:
        return plain
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[family].from_dict(raw)
    except Exception as error:
        raise BadCheckpoint(f"transformers refuses this config.json: {error}") from error
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act {config.hidden_act!r} is not served; supported: silu")
    return config


def _rope(config: Any, head_dim: int) -> Rope:
    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModel(f"rope type {rope_type!r} is not served; supported: {', '.join(_ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModel("a rotary embedding of a part of each head is not served")
    inv_freq: Tensor
    if rope_type in ("default", "dynamic"):
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq, scaling = 1.0 / (float(parameters["rope_theta"]) ** steps), 1.0
    elif rope_type == "llama3":
        inv_freq, scaling = llama3_inv_freq(parameters, head_dim), 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
    return Rope(tuple(inv_freq.tolist()), float(scaling))


def _windows(config: Any) -> tuple[int | None, ...]:
    count: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "llama":
        return (None,) * count
    if config.model_type == "mistral":
        return (window,) * count
    kinds = config.layer_types
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(f"layer types {sorted(unknown)} are not served")
    if len(kinds) != count:
        raise BadCheckpoint(f"layer_types names {len(kinds)} layers, num_hidden_layers {count}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _context_length(config: Any) -> int:
    """Longest sequence in tokens. Yarn configs often state the length before scaling; the others state the final one."""
    parameters = config.rope_parameters
    longest = int(config.max_position_embeddings)
    if parameters.get("rope_type") == "yarn" and parameters.get("factor"):
        original = parameters.get("original_max_position_embeddings") or longest
        longest = max(longest, int(original * parameters["factor"]))
    return longest
