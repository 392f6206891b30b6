"""Configs of peft that are not served, each refused by its name and with the reason.

What is not known here is refused too: it might change what an adapter computes.
"""

from collections.abc import Mapping
from typing import Any

from loraplex_adapters.errors import UnsupportedAdapter

CONFIG_NAME = "adapter_config.json"

_READ = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
}
# Only training, or the library itself, reads these.
_HARMLESS = {
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "runtime_config",
    "unsloth_fixed",
}
_FEATURES = {
    "fan_in_fan_out": ("fan_in_fan_out", "transposed weights (fan_in_fan_out)"),
    "megatron_config": ("megatron", "Megatron parallel layers"),
    "alora_invocation_tokens": ("alora", "activated LoRA"),
    "layer_replication": ("layer_replication", "replicated layers"),
    "target_parameters": ("target_parameters", "LoRA on bare parameters"),
    "use_qalora": ("qalora", "QALoRA"),
    "use_bdlora": ("bdlora", "block-diagonal LoRA"),
    "arrow_config": ("arrow", "Arrow routing"),
    "kasa_config": ("kasa", "KaSA"),
    "monteclora_config": ("monteclora", "MonteCLoRA"),
}
# Other methods of peft, by its name for them, and why they are no LoRA.
_OTHER_TYPES = {
    "VERA": "VeRA shares frozen random matrices between layers, which its file does not hold",
    "RANDLORA": "RandLora shares frozen random matrices between layers",
    "IA3": "IA3 scales activations",
    "LOHA": "LoHa multiplies two low-rank updates elementwise",
    "LOKR": "LoKr is a Kronecker product",
    "OFT": "OFT rotates the weights",
    "BOFT": "BOFT rotates the weights",
    "HRA": "HRA reflects the weights",
    "XLORA": "X-LoRA mixes adapters by a gate of its own; serve its parts as adapters",
    "ADALORA": "AdaLoRA has singular values beside its factors; merge it into the base, or save it as LoRA",
    "ADAPTION_PROMPT": "adaption prompts are attended to inside the layers",
    "PROMPT_TUNING": "prompt tuning prepends vectors that are no tokens",
    "P_TUNING": "p-tuning prepends vectors that are no tokens",
    "PREFIX_TUNING": "prefix tuning prepends keys and values",
    "MULTITASK_PROMPT_TUNING": "prompt tuning prepends vectors that are no tokens",
    "CPT": "context-aware prompt tuning prepends vectors that are no tokens",
    "TRAINABLE_TOKENS": "save trained tokens with LoRA: trainable_token_indices in a LoraConfig",
    "LN_TUNING": "LN tuning trains norms alone; save them with LoRA: modules_to_save in a LoraConfig",
    "POLY": "Polytropon mixes adapters by a router of its own",
    "FOURIERFT": "FourierFT's update is a Fourier series",
    "VBLORA": "VB-LoRA shares a bank of vectors between layers",
    "BONE": "Bone's update is blockwise",
    "MISS": "MiSS's update is blockwise",
}
_INITS = ("gaussian", "orthogonal", "eva", "mica")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


def refuse_unserved(config: Mapping[str, Any]) -> None:
    """Raises: UnsupportedAdapter naming what cannot be served."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(
            f"{CONFIG_NAME} has peft_type {str(kind)[:40]!r}; only 'LORA' adapters are served{_why(kind)}.",
            code="peft_type",
        )
    task = config.get("task_type")
    if task is not None and task not in _TASKS:
        raise UnsupportedAdapter(
            f"{CONFIG_NAME} has task_type {str(task)[:40]!r}; only language models are served.",
            code="task_type",
        )
    for key, (code, feature) in _FEATURES.items():
        if config.get(key) not in (None, False, [], {}, ""):
            raise _not_served(key, feature, code)
    _refuse_init(config.get("init_lora_weights", True))
    for key, value in config.items():
        if key in _READ or key in _HARMLESS or key in _FEATURES:
            continue
        if value is not None and value is not False and value not in ([], {}, ""):
            raise UnsupportedAdapter(
                f"{CONFIG_NAME} sets {key[:60]!r}, which is not known here and might change what the adapter computes. "
                "Remove the key if it does not matter.",
                code="unknown_config_key",
            )


def _why(kind: Any) -> str:
    reason = _OTHER_TYPES.get(kind) if isinstance(kind, str) else None
    return f": {reason}" if reason else ""


def _not_served(key: str, feature: str, code: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"{CONFIG_NAME} sets {key!r}: {feature} cannot be served. Train or export the adapter without it.", code=code
    )


def _refuse_init(init: Any) -> None:
    if init is None or isinstance(init, bool) or init in _INITS:
        return
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        raise UnsupportedAdapter(
            f"{CONFIG_NAME} says init_lora_weights={init[:40]!r}: training began by taking this start out of the base's "
            "weights, so the adapter fits only that changed base. Convert it to plain LoRA with peft: save the untrained "
            "adapter, with init_lora_weights=true in its config, before training, and after it call "
            "save_pretrained(..., path_initial_model_for_weight_conversion=<the untrained adapter>). The outcome has twice "
            "the rank and is served exactly.",
            code="init_changes_base",
        )
    raise UnsupportedAdapter(
        f"{CONFIG_NAME} says init_lora_weights={str(init)[:40]!r}, which is not known here.", code="unknown_init"
    )
