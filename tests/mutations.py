"""Ways in which an adapter's folder differs from what peft saved: some harmless, most not."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Config = dict[str, Any]
Mutation = Callable[[random.Random, Tensors, Config], None]

_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int64)
_WORDS = (
    "q_proj",
    "k_proj",
    "up_proj",
    "layers.0",
    "layers.1",
    "self_attn",
    "mlp",
    "lora_A",
    "lora_B",
    "model",
    "weight",
)
_MODULES = ("q_proj", "v_proj", "down_proj", "layers.0.self_attn.k_proj", "lm_head", "embed_tokens", "norm", "router")


def mutate(seed: int, source: Path, target: Path) -> str:
    """Write a folder that differs from ``source`` in one to three ways; which ones."""
    chance = random.Random(seed)
    tensors: Tensors = {name: t.clone() for name, t in load_file(source / "adapter_model.safetensors").items()}
    config: Config = json.loads((source / "adapter_config.json").read_text())
    chosen = [chance.choice(MUTATIONS) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
    for mutation in chosen:
        if tensors:
            mutation(chance, tensors, config)
    target.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(config))
    return f"{seed}: " + ", ".join(mutation.__name__.strip("_") for mutation in chosen)


def _pick(chance: random.Random, tensors: Tensors) -> str:
    return chance.choice(sorted(tensors))


def _drop(chance: random.Random, tensors: Tensors, config: Config) -> None:
    del tensors[_pick(chance, tensors)]


def _copy(chance: random.Random, tensors: Tensors, config: Config) -> None:
    name = _pick(chance, tensors)
    tensors[name.replace(chance.choice(_WORDS), chance.choice(_WORDS))] = tensors[name].clone()


def _rename(chance: random.Random, tensors: Tensors, config: Config) -> None:
    name = _pick(chance, tensors)
    tensors[name.replace(chance.choice(_WORDS), chance.choice(_WORDS), 1)] = tensors.pop(name)


def _misspell(chance: random.Random, tensors: Tensors, config: Config) -> None:
    name = _pick(chance, tensors)
    at = chance.randrange(len(name))
    tensors[name[:at] + chance.choice(("", "_", ".", "x", "0")) + name[at + chance.choice((0, 1)) :]] = tensors.pop(
        name
    )


def _respell(chance: random.Random, tensors: Tensors, config: Config) -> None:
    ways: list[Callable[[str], str]] = [
        lambda name: name.replace("lora_A.weight", "lora_A.default.weight"),
        lambda name: name.replace("lora_B.weight", "lora_B.default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("layers.", "_fsdp_wrapped_module.layers."),
        lambda name: f"module.{name}",
        lambda name: name + ".weight" if name.endswith("magnitude_vector") else name,
    ]
    way = chance.choice(ways)
    for name in sorted(tensors):
        tensors[way(name)] = tensors.pop(name)


def _retype(chance: random.Random, tensors: Tensors, config: Config) -> None:
    dtype = chance.choice(_DTYPES)
    for name in sorted(tensors) if chance.random() < 0.5 else [_pick(chance, tensors)]:
        tensors[name] = tensors[name].to(dtype)


def _reshape(chance: random.Random, tensors: Tensors, config: Config) -> None:
    name = _pick(chance, tensors)
    tensor = tensors[name]
    ways: list[Callable[[], Tensor]] = [
        lambda: tensor[:-1],
        lambda: tensor[..., :-1],
        lambda: tensor.T if tensor.ndim == 2 else tensor,
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: torch.cat((tensor, tensor)),
        lambda: tensor[:0],
    ]
    tensors[name] = chance.choice(ways)().clone()


def _spoil(chance: random.Random, tensors: Tensors, config: Config) -> None:
    name = _pick(chance, tensors)
    if tensors[name].numel() and tensors[name].dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors[name].view(-1)[chance.randrange(tensors[name].numel())] = chance.choice((float("nan"), float("inf")))


def _rescale(chance: random.Random, tensors: Tensors, config: Config) -> None:
    name = _pick(chance, tensors)
    if tensors[name].dtype == torch.float32:
        tensors[name] = tensors[name] * chance.uniform(0.5, 1.5)


def _add(chance: random.Random, tensors: Tensors, config: Config) -> None:
    name = _pick(chance, tensors)
    module = name.rpartition(".lora_")[0] or name
    suffix = chance.choice(
        (
            "lora_C.weight",
            "lora_magnitude_vector",
            "lora_B.bias",
            "bias",
            "base_layer.weight",
            "vera_lambda_b",
            "ia3_l",
            "hada_w1_a",
            "trainable_tokens_delta",
        )
    )
    tensors[f"{module}.{suffix}"] = torch.rand(tensors[name].shape[0] if tensors[name].ndim else 1)


def _configure(chance: random.Random, tensors: Tensors, config: Config) -> None:
    changes: list[tuple[str, Any]] = [
        ("r", chance.choice((1, 4, 8, 9, 0, "8", None))),
        ("lora_alpha", chance.choice((1, 3, 16, 0, -2, 2.5, "x"))),
        ("use_rslora", chance.choice((True, False))),
        ("use_dora", chance.choice((True, False))),
        ("lora_bias", True),
        ("bias", chance.choice(("all", "lora_only", "none", "some"))),
        ("rank_pattern", chance.choice(({"q_proj": 8}, {"v_proj": 3}, {r"layers\.\d+\.mlp\..*": 8}))),
        (
            "alpha_pattern",
            chance.choice(({"q_proj": 5}, {r".*\.(k|v)_proj": 2.5}, {"layers.1.mlp.up_proj": 7, "up_proj": 3})),
        ),
        ("target_modules", chance.sample(_MODULES, chance.randrange(1, 4))),
        (
            "target_modules",
            [*config["target_modules"], chance.choice(_MODULES)]
            if isinstance(config.get("target_modules"), list)
            else None,
        ),
        ("exclude_modules", [chance.choice(_MODULES)]),
        ("layers_to_transform", chance.choice(([0], [1], [0, 1], 1, [7], None))),
        ("layers_pattern", chance.choice(("layers", "h", None))),
        ("modules_to_save", chance.sample(_MODULES, chance.randrange(1, 3))),
        ("modules_to_save", None),
        ("trainable_token_indices", chance.choice(([1, 2, 3], [7, 100, 261], [5], {"lm_head": [1]}, [9999], None))),
        (
            "init_lora_weights",
            chance.choice(("pissa", "pissa_niter_4", "olora", "loftq", "eva", "gaussian", False, "new")),
        ),
        ("peft_type", chance.choice(("VERA", "IA3", "LOHA", "XLORA", "PROMPT_TUNING", "ADALORA"))),
        ("fan_in_fan_out", chance.choice((True, False))),
        ("task_type", chance.choice(("SEQ_CLS", "CAUSAL_LM", None))),
        ("ensure_weight_tying", True),
        ("lora_dropout", 0.3),
        (chance.choice(("use_new_maths", "alora_invocation_tokens", "layer_replication", "use_qalora")), [1, 2]),
    ]
    key, value = chance.choice(changes)
    config[key] = value


def _forget(chance: random.Random, tensors: Tensors, config: Config) -> None:
    config.pop(chance.choice(sorted(config)), None)


MUTATIONS: tuple[Mutation, ...] = (
    _drop, _copy, _rename, _misspell, _respell, _respell, _retype, _retype, _reshape, _spoil, _rescale, _add,
    _configure, _configure, _configure, _configure, _forget,
)  # fmt: skip
