"""What an adapter's folder means, computed the long way: a model with every weight changed as the folder says.

Written apart from the code under test: names by their words, scalings and targets by peft's own rules, and updates as
dense matrices. What the folder says and this cannot place is an error, never ignored.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

_NOISE: Final = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
_PARTS: Final = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "trainable_tokens_delta": "tokens",
}
_SKIPPED: Final = {"base_model", "base_layer", "token_adapter", "modules_to_save", "weight", "default"}


class Misplaced(Exception):
    """The folder says something that has no meaning here."""


class DenseModel:
    """A transformers model whose weights are set anew for every folder."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._base = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._modules = [name for name, module in self._model.named_modules() if hasattr(module, "weight")]

    @torch.inference_mode()
    def logprobs(self, folder: Path, token_ids: Sequence[int]) -> Tensor:
        """After the last of the tokens: [V]. Raises: Misplaced."""
        changed = self._changed(folder)
        self._model.load_state_dict({**self._base, **changed})
        logits: Tensor = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits
        return logits[0, -1].log_softmax(dim=-1)

    def _changed(self, folder: Path) -> dict[str, Tensor]:
        config = json.loads((folder / "adapter_config.json").read_text())
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            module, part = self._place(name)
            found.setdefault(module, {})[part] = tensor.float()
        self._check_targets(config, found)
        changed: dict[str, Tensor] = {}
        for module, parts in found.items():
            weight = parts.pop("weight", self._base[f"{module}.weight"])
            if "tokens" in parts:
                weight = weight.clone()
                weight[_tokens(config, module)] = parts.pop("tokens")
            if "A" in parts:
                weight, bias = _with_lora(config, module, weight, parts)
                if bias is not None:
                    # The models here have no biases of their own to which it could be added.
                    raise Misplaced(f"{module} has a bias")
            if parts:
                raise Misplaced(f"{module} has {sorted(parts)}")
            changed[f"{module}.weight"] = weight
        return changed

    def _place(self, name: str) -> tuple[str, str]:
        words = [word for word in name.split(".") if word not in _NOISE]
        part = "weight"
        for word in words:
            part = _PARTS.get(word, part)
        if words[-1] == "bias":
            part = "B.bias" if "lora_B" in words else "bias"
        path = [word for word in words if word not in _SKIPPED | set(_PARTS) and word not in ("model", "bias")]
        fitting = [m for m in self._modules if [w for w in m.split(".") if w != "model"] == path]
        if len(fitting) != 1:
            raise Misplaced(name)
        return fitting[0], part

    def _check_targets(self, config: dict[str, Any], found: dict[str, dict[str, Tensor]]) -> None:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        if not config.get("target_modules"):
            return  # the tensors say what is meant
        # layers_pattern has one meaning for these models.
        keys = ("target_modules", "exclude_modules", "layers_to_transform")
        known = LoraConfig(**{key: config[key] for key in keys if config.get(key)})
        for module in self._modules:
            targeted = bool(check_target_module_exists(known, module))
            if targeted != ("A" in found.get(module, {})):
                raise Misplaced(f"{module} is {'' if targeted else 'not '}targeted")


def _tokens(config: dict[str, Any], module: str) -> list[int]:
    said = config["trainable_token_indices"]
    tokens: list[int] = said if isinstance(said, list) else said[module.rpartition(".")[2]]
    return tokens


def _with_lora(
    config: dict[str, Any], module: str, weight: Tensor, parts: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    a, b = parts.pop("A"), parts.pop("B")
    alpha, rank = config.get("lora_alpha", 8), config.get("r", 8)
    for patterns, name in ((config.get("alpha_pattern"), "alpha"), (config.get("rank_pattern"), "rank")):
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha, rank = (value, rank) if name == "alpha" else (alpha, value)
                break
    if rank != a.shape[0]:
        raise Misplaced(f"{module} has rank {a.shape[0]}, not {rank}")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    update = scaling * (b @ a)
    is_embedding = module.endswith("embed_tokens")
    seen = weight.T if is_embedding else weight
    new = seen + update
    if config.get("use_dora"):
        new = parts.pop("magnitude")[:, None] * new / new.norm(dim=1, keepdim=True)
    return (new.T if is_embedding else new), parts.pop("B.bias", None)
