"""Writes adapters as PEFT LoRA directories."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loraplex_adapters.base import EMBED, module_path
from loraplex_adapters.layout import WEIGHTS_NAME
from loraplex_adapters.lora_config import CONFIG_NAME
from loraplex_adapters.weights import AdapterWeights, LoraFactors


def write(directory: Path, weights: AdapterWeights, *, base_model_name: str | None = None) -> None:
    """Write ``weights`` as a PEFT LoRA directory, the inverse of ``format.read``.

    Ranks and alphas that differ between modules go to rank_pattern and alpha_pattern; scalings come back to within
    one rounding of a float64.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = _config(weights, base_model_name)
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # Of parts that share memory (an A that several linears use) each is written for itself.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _tensors(weights).items()}
    with contextlib.suppress(FileNotFoundError):
        (directory / WEIGHTS_NAME).unlink()  # a map of the old file stays valid
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def _config(weights: AdapterWeights, base_model_name: str | None) -> dict[str, Any]:
    alphas = {module: factors.scaling * factors.rank for module, factors in weights.factors.items()}
    r = _most_common(list(weights.ranks.values()), 8)
    alpha = _most_common(list(alphas.values()), 8.0)
    layers = sorted({layer for layer, _ in weights.factors})
    linears = sorted({linear for _, linear in weights.factors})
    full = len(layers) * len(linears) == len(weights.factors) and all(layer >= 0 for layer in layers)
    tokens = {module[1]: list(rows.indices) for module, rows in weights.rows.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "bias": "lora_only" if weights.biases else "none",
        "lora_bias": any(factors.b_bias is not None for factors in weights.factors.values()),
        "use_dora": any(factors.magnitude is not None for factors in weights.factors.values()),
        "target_modules": linears if full else [module_path(*module) for module in sorted(weights.factors)],
        "layers_to_transform": layers if full else None,
        "rank_pattern": {module_path(*m): rank for m, rank in weights.ranks.items() if rank != r},
        "alpha_pattern": {module_path(*m): value for m, value in alphas.items() if value != alpha},
        "modules_to_save": sorted(module_path(*module) for module in weights.whole) or None,
        "trainable_token_indices": tokens or None,
        "ensure_weight_tying": weights.ties_lora or (weights.ties_whole and EMBED in weights.whole),
    }


def _most_common(values: list[Any], default: Any) -> Any:
    return Counter(values).most_common(1)[0][0] if values else default


def _tensors(weights: AdapterWeights) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for module, factors in weights.factors.items():
        for name, tensor in _factor_tensors(module == EMBED, factors).items():
            found[f"base_model.model.{module_path(*module)}.{name}"] = tensor
    for module, bias in weights.biases.items():
        found[f"base_model.model.{module_path(*module)}.base_layer.bias"] = bias
    for module, weight in weights.whole.items():
        found[f"base_model.model.{module_path(*module)}.weight"] = weight
    for module, rows in weights.rows.items():
        found[f"base_model.model.{module_path(*module)}.token_adapter.trainable_tokens_delta"] = rows.values
    return found


def _factor_tensors(is_embedding: bool, factors: LoraFactors) -> dict[str, Tensor]:
    prefix, suffix = ("lora_embedding_", "") if is_embedding else ("lora_", ".weight")
    found = {f"{prefix}A{suffix}": factors.a, f"{prefix}B{suffix}": factors.b}
    if factors.magnitude is not None:
        found["lora_magnitude_vector"] = factors.magnitude
    if factors.b_bias is not None:
        found["lora_B.bias"] = factors.b_bias
    return found
