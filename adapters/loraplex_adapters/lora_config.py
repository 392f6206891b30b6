"""adapter_config.json, read strictly: what changes the maths is understood or refused by name."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loraplex_adapters.base import (
    EMBED,
    FINAL_NORM,
    FUSED_LINEARS,
    HEAD,
    LAYER_NORMS,
    LINEARS,
    QK_NORMS,
    BaseShape,
    ModuleKey,
    module_path,
)
from loraplex_adapters.errors import InvalidAdapter, UnsupportedAdapter
from loraplex_adapters.patterns import ModulePatterns
from loraplex_adapters.unserved import CONFIG_NAME as CONFIG_NAME
from loraplex_adapters.unserved import refuse_unserved

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16


@dataclass(frozen=True)
class LoraConfig:
    """The part of a PEFT LoRA config that decides what the adapter computes."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: frozenset[str] | str | None
    exclude_modules: frozenset[str] | str | None
    layers_to_transform: frozenset[int] | None
    base_model_name: str | None
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: frozenset[str] = frozenset()
    token_indices: Mapping[ModuleKey, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False

    @cached_property
    def _alphas(self) -> ModulePatterns:
        return ModulePatterns(self.alpha_pattern)

    @cached_property
    def _ranks(self) -> ModulePatterns | None:
        try:
            return ModulePatterns(self.rank_pattern)
        except UnsupportedAdapter:
            return None  # the tensors tell the ranks anyway

    def scaling(self, module: ModuleKey, rank: int) -> float:
        """The factor of B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        pattern = self._alphas.first(module_path(*module))
        alpha = self.alpha if pattern is None else self.alpha_pattern[pattern]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rank(self, module: ModuleKey) -> int | None:
        """The rank that the config gives the module; None where its patterns cannot be matched safely."""
        if self._ranks is None:
            return None
        pattern = self._ranks.first(module_path(*module))
        return self.r if pattern is None else self.rank_pattern[pattern]

    def targets(self, base: BaseShape) -> frozenset[ModuleKey] | None:
        """The linears that the config targets in ``base``; None where a regular expression says so (never run)."""
        if isinstance(self.exclude_modules, str):
            return None
        target = frozenset(LINEARS) if self.target_modules == "all-linear" else self.target_modules
        if target is None or isinstance(target, str):
            return None
        # Norms cannot have LoRA; one that is targeted is missed in the file.
        names = (*base.linears, *FUSED_LINEARS, *LAYER_NORMS, *QK_NORMS)
        modules = [(layer, linear) for layer in range(base.num_layers) for linear in names]
        return frozenset(module for module in (*modules, EMBED, HEAD, FINAL_NORM) if self._targets(target, module))

    def saves(self, module: ModuleKey) -> bool:
        """Whether the config says that this module was trained whole (by the end of its path, as peft matches)."""
        path = module_path(*module)
        return any(path.endswith(name) for name in self.modules_to_save)

    def _targets(self, names: Collection[str], module: ModuleKey) -> bool:
        path = module_path(*module)
        if self.exclude_modules and _named(self.exclude_modules, path):
            return False
        in_layers = self.layers_to_transform is None or module[0] in self.layers_to_transform
        return path in names or (in_layers and _named(names, path))


def _named(names: Collection[str], path: str) -> bool:
    """Whether ``path`` is one of ``names`` or ends with one of them after a dot."""
    parts = path.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))


def read_config(directory: Path) -> LoraConfig:
    """Read and judge ``adapter_config.json``.

    Raises: InvalidAdapter if it is missing or malformed, UnsupportedAdapter naming the feature that is not served.
    """
    path = directory / CONFIG_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise missing_config() from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidAdapter(f"{CONFIG_NAME} is larger than {MAX_CONFIG_BYTES} bytes.", code="config_too_large")
    try:
        config = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"it is not valid JSON ({str(error)[:120]})") from None
    if not isinstance(config, dict):
        raise _malformed("it is not a JSON object")
    refuse_unserved(config)
    return _lora_config(config)


def missing_config() -> InvalidAdapter:
    return InvalidAdapter(
        f"{CONFIG_NAME} is missing. An adapter is the folder that peft's save_pretrained() writes: "
        f"{CONFIG_NAME} and adapter_model.safetensors.",
        code="adapter_config_missing",
    )


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _malformed(why: str) -> InvalidAdapter:
    return InvalidAdapter(f"{CONFIG_NAME} cannot be used: {why}.", code="adapter_config_invalid")


def _lora_config(config: Mapping[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=_rank("r", config.get("r", 8)),
        alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=_flag("use_rslora", config.get("use_rslora")),
        rank_pattern={key: _rank("rank_pattern", n) for key, n in _table("rank_pattern", config).items()},
        alpha_pattern={key: _number("alpha_pattern", n) for key, n in _table("alpha_pattern", config).items()},
        target_modules=_names("target_modules", config),
        exclude_modules=_names("exclude_modules", config) or None,
        layers_to_transform=_layers(config),
        base_model_name=_text(config.get("base_model_name_or_path")),
        use_dora=_flag("use_dora", config.get("use_dora")),
        lora_bias=_flag("lora_bias", config.get("lora_bias")),
        bias=_bias(config.get("bias")),
        modules_to_save=_modules_to_save(config),
        token_indices=_token_indices(config.get("trainable_token_indices")),
        ensure_weight_tying=_flag("ensure_weight_tying", config.get("ensure_weight_tying")),
    )


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _malformed(f"{key!r} must give whole ranks from 1 to {MAX_RANK}, not {str(value)[:40]}")
    return value


def _number(key: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number) or abs(number) > 1e9:
        raise _malformed(f"{key!r} must give finite numbers up to 1e9, not {str(value)[:40]}")
    return number


def _flag(key: str, value: Any) -> bool:
    if value not in (None, True, False) or type(value) in (int, float):
        raise _malformed(f"{key!r} must be true or false")
    return bool(value)


def _text(value: Any) -> str | None:
    return value[:512] if isinstance(value, str) else None


def _table(key: str, config: Mapping[str, Any]) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise _malformed(f"{key!r} must be an object")
    return value


def _names(key: str, config: Mapping[str, Any]) -> frozenset[str] | str | None:
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > 10_000 or not all(isinstance(name, str) for name in value):
        raise _malformed(f"{key!r} must be a string or a list of at most 10000 strings")
    return frozenset(value)


def _modules_to_save(config: Mapping[str, Any]) -> frozenset[str]:
    names = _names("modules_to_save", config)
    if isinstance(names, str):
        raise _malformed("'modules_to_save' must be a list of strings")
    if names and "" in names:
        raise _malformed("'modules_to_save' holds an empty name")
    return names or frozenset()


def _bias(value: Any) -> str:
    if value is None:
        return "none"
    if not isinstance(value, str) or value not in ("none", "all", "lora_only"):
        raise _malformed(f"'bias' must be 'none', 'all' or 'lora_only', not {str(value)[:40]!r}")
    return value


def _token_indices(value: Any) -> dict[ModuleKey, tuple[int, ...]]:
    """Trained tokens of the embeddings (a plain list means these) and of the head."""
    if value is None or value in ([], {}):
        return {}
    found: dict[ModuleKey, tuple[int, ...]] = {}
    for name, indices in value.items() if isinstance(value, dict) else [("embed_tokens", value)]:
        module = {"embed_tokens": EMBED, "lm_head": HEAD}.get(str(name).rpartition(".")[2])
        if module is None or module in found:
            raise _malformed(
                f"'trainable_token_indices' names {str(name)[:40]!r}; embed_tokens and lm_head have tokens"
            )
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise _malformed("'trainable_token_indices' must give token ids")
        if len(set(indices)) != len(indices) or not indices:
            raise _malformed("'trainable_token_indices' must give at least one token, and none twice")
        found[module] = tuple(indices)
    return found


def _layers(config: Mapping[str, Any]) -> frozenset[int] | None:
    value = config.get("layers_to_transform")
    pattern = config.get("layers_pattern")
    if pattern not in (None, "", [], "layers", ["layers"]):
        raise _malformed("'layers_pattern' must be 'layers', the only stack of layers there is")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _malformed("'layers_to_transform' must give layer numbers")
    return frozenset(layers)
