"""Small bases and adapters for the tests: real ones made by peft, and quick random ones."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loraplex_adapters import format as adapter_format
from loraplex_adapters.base import LINEARS, BaseShape, module_path
from loraplex_adapters.format import AdapterWeights, LoraFactors

NUM_LAYERS, HIDDEN, MLP, KV = 3, 32, 48, 16
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KV, HIDDEN),
    "v_proj": (KV, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (MLP, HIDDEN),
    "up_proj": (MLP, HIDDEN),
    "down_proj": (HIDDEN, MLP),
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tiny_base(fingerprint: str = "f" * 64) -> BaseShape:
    return BaseShape("llama", NUM_LAYERS, SHAPES, vocab_size=64, hidden_size=HIDDEN, fingerprint=fingerprint)


def save_with_peft(directory: Path, seed: int = 0, **lora: Any) -> dict[tuple[int, str], torch.Tensor]:
    """Let peft save a LoRA of the tiny base; the deltas [N, K] that peft itself would add, by module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
        lora.setdefault("init_lora_weights", False)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", **lora))
        model.save_pretrained(directory)
        modules = dict(model.get_base_model().named_modules())
    return {
        (layer, linear): modules[module_path(layer, linear)].get_delta_weight("default").detach()
        for layer in range(NUM_LAYERS)
        for linear in LINEARS
        if hasattr(modules[module_path(layer, linear)], "lora_A")
    }


def random_weights(
    seed: int = 0, rank: int = 2, scaling: float = 0.5, layers: range | None = None, linears: tuple[str, ...] = LINEARS
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in layers or range(NUM_LAYERS):
        for linear in linears:
            n, k = SHAPES[linear]
            a, b = torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)
            factors[layer, linear] = LoraFactors(a, b, scaling)
    return AdapterWeights(factors)


def save_random(directory: Path, seed: int = 0, **weights: Any) -> Path:
    """Write a random adapter of the tiny base; the directory."""
    adapter_format.write(directory, random_weights(seed, **weights))
    return directory


def edit_config(directory: Path, **changes: Any) -> Path:
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def edit_tensors(directory: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Add, replace or (None) remove tensors."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(directory / WEIGHTS), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, directory / WEIGHTS)
    return directory


def tensor_name(layer: int, linear: str, factor: str) -> str:
    return f"base_model.model.{module_path(layer, linear)}.lora_{factor}.weight"
