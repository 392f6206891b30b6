"""Adapters with every feature that peft's LoRA can train, made by peft with random values, and what peft answers."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from tests.models import LINEARS, VOCAB_SIZE


@dataclass(frozen=True)
class Feature:
    """What to train: fields of peft's config; ``vocab``: rows that the vocabulary is resized to first; ``families`` that
    have what it needs (None = all); ``convert``: through peft's conversion to plain LoRA; ``rewrite``: what becomes of
    the saved file, while peft answers from the file as it was."""

    lora: dict[str, Any] = field(default_factory=dict)
    vocab: int = VOCAB_SIZE
    families: tuple[str, ...] | None = None
    convert: bool = False
    rewrite: Callable[[Path], None] | None = None


def _retype(dtype: torch.dtype) -> Callable[[Path], None]:
    """Store the tensors in another dtype; the values that it cannot hold are rounded in peft's file too."""

    def rewrite(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path / WEIGHTS)
        save_file({name: tensor.to(dtype).float() for name, tensor in tensors.items()}, path / PEFT_COPY / WEIGHTS)

    return rewrite


def _rename(*replacements: tuple[str, str]) -> Callable[[Path], None]:
    """Spell the tensors' names otherwise."""

    def rewrite(path: Path) -> None:
        tensors = {}
        for name, tensor in load_file(path / WEIGHTS).items():
            for old, new in replacements:
                name = name.replace(old, new)
            tensors[name] = tensor
        save_file(tensors, path / WEIGHTS)

    return rewrite


def _fuse(path: Path) -> None:
    """Stack q, k, v and gate, up as trainers with fused linears do: one A, the rows of B below each other. peft cannot
    load that; it answers from the parts."""
    tensors = load_file(path / WEIGHTS)
    fused = dict(tensors)
    for stacked, parts in (
        ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
    ):
        block = stacked.split(".")[0]
        for layer in range(2):
            prefix = f"base_model.model.model.layers.{layer}."
            keys = [f"{prefix}{block}.{part}" for part in parts]
            for key in keys[1:]:
                tensors[f"{key}.lora_A.weight"] = tensors[f"{keys[0]}.lora_A.weight"].clone()
            for suffix in ("lora_B.weight", "lora_magnitude_vector"):
                if f"{keys[0]}.{suffix}" in tensors:
                    fused[f"{prefix}{stacked}.{suffix}"] = torch.cat([fused.pop(f"{key}.{suffix}") for key in keys])
            shared = [fused.pop(f"{key}.lora_A.weight") for key in keys]
            fused[f"{prefix}{stacked}.lora_A.weight"] = shared[0]
    save_file(tensors, path / PEFT_COPY / WEIGHTS)
    save_file(fused, path / WEIGHTS)
    config = json.loads((path / CONFIG).read_text())
    config["target_modules"] = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
    (path / CONFIG).write_text(json.dumps(config))


CONFIG, WEIGHTS, PEFT_COPY = "adapter_config.json", "adapter_model.safetensors", "as-peft-has-it"
ADDED: Final = VOCAB_SIZE + 5
UNTIED: Final = ("llama", "mistral", "qwen3")

FEATURES: Final[dict[str, Feature]] = {
    "lora": Feature(),
    "rslora": Feature({"use_rslora": True, "r": 9}),
    "patterns": Feature({"rank_pattern": {"o_proj": 12}, "alpha_pattern": {"k_proj": 20}}),
    "layers": Feature({"layers_to_transform": [1], "layers_pattern": "layers"}),
    "dora": Feature({"use_dora": True}),
    "dora-some-rslora": Feature(
        {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"], "r": 3}
    ),
    "dora-patterns": Feature({"use_dora": True, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"down_proj": 3}}),
    "lora-bias": Feature({"lora_bias": True, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}),
    "bias-all": Feature({"bias": "all", "target_modules": ["q_proj", "up_proj"]}, families=("qwen2",)),
    "bias-lora-only": Feature({"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}, families=("qwen2",)),
    "dora-bias-all": Feature({"bias": "all", "use_dora": True}, families=("qwen2",)),
    "head": Feature({"target_modules": ["q_proj", "lm_head"]}),
    "head-dora": Feature({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, families=UNTIED),
    "embeddings": Feature({"target_modules": ["v_proj", "embed_tokens"]}),
    "embeddings-dora": Feature({"target_modules": ["v_proj", "embed_tokens"], "use_dora": True}),
    "embeddings-and-head": Feature({"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, families=UNTIED),
    "whole-head": Feature({"modules_to_save": ["lm_head"]}),
    "whole-embeddings": Feature({"modules_to_save": ["embed_tokens"]}),
    "whole-both": Feature({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole-norms": Feature({"modules_to_save": ["norm"], "target_modules": ["q_proj"]}),
    "whole-layer-norms": Feature({"modules_to_save": ["input_layernorm", "embed_tokens"], "use_dora": True}),
    "whole-tied": Feature({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, families=("qwen2",)),
    "lora-tied": Feature(
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, families=("qwen2",)
    ),
    "tokens": Feature({"trainable_token_indices": [7, 100, 261]}),
    "tokens-of-both": Feature(
        {"trainable_token_indices": {"embed_tokens": [7, 100], "lm_head": [3, 9, 261]}}, families=UNTIED
    ),
    "tokens-dora": Feature({"trainable_token_indices": [7, 9], "use_dora": True}),
    "added-tokens": Feature({"modules_to_save": ["embed_tokens", "lm_head"]}, vocab=ADDED),
    "added-rows": Feature({"target_modules": ["q_proj"]}, vocab=ADDED),
    "added-and-trained": Feature({"trainable_token_indices": [VOCAB_SIZE, VOCAB_SIZE + 4]}, vocab=ADDED),
    "fewer-rows": Feature({"target_modules": ["q_proj"]}, vocab=VOCAB_SIZE - 40),
    "pissa-converted": Feature({"init_lora_weights": "pissa"}, convert=True),
    "olora-converted": Feature({"init_lora_weights": "olora"}, convert=True),
    "fused-names": Feature(rewrite=_fuse),
    "fused-names-dora": Feature({"use_dora": True}, rewrite=_fuse),
    "old-names": Feature(rewrite=_rename((".weight", ".default.weight"))),
    "old-names-whole": Feature(
        {"modules_to_save": ["lm_head"], "use_dora": True},
        rewrite=_rename(
            ("lm_head.weight", "lm_head.modules_to_save.default.weight"), ("vector", "vector.default.weight")
        ),
    ),
    "wrapped-names": Feature(
        rewrite=_rename(
            ("base_model.model.", "base_model.model._orig_mod."), ("layers.1.", "layers.1._fsdp_wrapped_module.")
        )
    ),
    "bfloat16": Feature({"use_dora": True}, rewrite=_retype(torch.bfloat16)),
    "float16": Feature({"modules_to_save": ["norm"]}, rewrite=_retype(torch.float16)),
    "float8": Feature(rewrite=_retype(torch.float8_e4m3fn)),
    "everything": Feature(
        {
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"o_proj": 12},
            "modules_to_save": ["norm", "input_layernorm", "lm_head"],
            "trainable_token_indices": [7, 100, 261],
            "bias": "all",
        },
        families=("llama", "mistral", "qwen3"),
    ),
}


def features_of(family: str) -> list[str]:
    return [name for name, feature in FEATURES.items() if feature.families is None or family in feature.families]


@contextmanager
def quiet() -> Iterator[None]:
    """peft tells users about embeddings, biases and tied weights; here all of it is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base_model(checkpoint: Path, vocab: int = VOCAB_SIZE, *, dtype: Any = torch.float32, nf4: bool = False) -> Any:
    """transformers' model, its vocabulary resized to ``vocab`` rows."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=quantization if nf4 else None
    )
    if vocab != VOCAB_SIZE:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    return model


def make_feature(path: Path, checkpoint: Path, name: str, seed: int) -> Path:
    """Save an adapter with this feature into ``path``, everything that it trains changed at random."""
    from peft import LoraConfig, get_peft_model

    feature = FEATURES[name]
    config = {"r": 8, "target_modules": list(LINEARS), **feature.lora}
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        model = get_peft_model(base_model(checkpoint, feature.vocab), LoraConfig(task_type="CAUSAL_LM", **config))
        if feature.convert:
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(path / "untrained")
            model.peft_config["default"].init_lora_weights = feature.lora["init_lora_weights"]
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "original" in parameter_name or not _is_trained(parameter_name, parameter):
                    continue
                noise = torch.randn_like(parameter) * 0.1
                if "magnitude" in parameter_name:
                    parameter.mul_(1 + 2 * noise)
                elif "lora_" in parameter_name and not feature.convert:
                    parameter.copy_(noise)
                else:
                    parameter.add_(noise / 2)
        if feature.convert:
            model.save_pretrained(path, path_initial_model_for_weight_conversion=path / "untrained")
        else:
            model.save_pretrained(path)
    if feature.rewrite is not None:
        shutil.copytree(path, path / PEFT_COPY)
        feature.rewrite(path)
    return path


def _is_trained(name: str, parameter: torch.Tensor) -> bool:
    resized = parameter.ndim == 2 and parameter.shape[0] in (ADDED, VOCAB_SIZE - 40)
    return parameter.requires_grad or "lora_" in name or (resized and "weight" in name)


class PeftAnswers:
    """What transformers and peft answer with one adapter, on a base of its own: some adapters write to it."""

    def __init__(self, checkpoint: Path, path: Path, name: str, *, nf4: bool = False) -> None:
        from peft import PeftModel

        with quiet():
            base = base_model(checkpoint, FEATURES[name].vocab, nf4=nf4)
            copy = path / PEFT_COPY
            self._model: Any = PeftModel.from_pretrained(base, copy if copy.exists() else path).eval()

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities after every position: [len(token_ids), V]."""
        with quiet():
            logits = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits
        scores: torch.Tensor = logits[0].float().log_softmax(dim=-1)
        return scores

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
        """The tokens, and the log-probabilities [max_tokens, V] that they were chosen by."""
        tokens, rows = list(prompt), []
        for _ in range(max_tokens):
            rows.append(self.logprobs(tokens)[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens[len(prompt) :], torch.stack(rows)
