"""What an adapter's directory says before any tensor is touched: its config, and what lies where in its file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapters.base import EMBED, FUSED_LINEARS, HEAD, LINEARS, ModuleKey, module_path
from loraplex_adapters.errors import InvalidAdapter, UnsupportedAdapter
from loraplex_adapters.header import TensorInfo, read_header
from loraplex_adapters.lora_config import CONFIG_NAME, LoraConfig, missing_config, read_config
from loraplex_adapters.tensor_names import (
    B_BIAS,
    BIAS,
    MAGNITUDE,
    ORIGINAL,
    SAVED,
    TOKENS,
    WEIGHT,
    A,
    B,
    TensorKey,
    parse_tensor_name,
)

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")


@dataclass(frozen=True)
class AdapterLayout:
    """A directory's config, and where each tensor lies in its file.

    ``tensors``: (module, part) -> (name in the file, dtype, shape and offsets); the parts are those of ``tensor_names``.
    """

    config: LoraConfig
    tensors: Mapping[TensorKey, tuple[str, TensorInfo]]
    scalings: Mapping[ModuleKey, float]

    @property
    def modules(self) -> list[ModuleKey]:
        """The modules that LoRA changes."""
        return sorted({module for module, part in self.tensors if part == A})

    def rank(self, module: ModuleKey) -> int:
        return self.tensors[module, A][1].shape[0]

    def info(self, module: ModuleKey, part: str) -> TensorInfo | None:
        found = self.tensors.get((module, part))
        return found[1] if found else None

    def with_part(self, part: str) -> list[ModuleKey]:
        """The modules of which the file holds this part."""
        return sorted(module for module, own in self.tensors if own == part)

    def tokens_of(self, module: ModuleKey) -> tuple[int, ...]:
        """The trained tokens of the embeddings or the head, () for none. A head that shares its rows trains the same."""
        said = self.config.token_indices
        return said.get(module) or (said.get(EMBED, ()) if module == HEAD else ())

    @property
    def is_fused(self) -> bool:
        """Whether it names linears that the base has in parts."""
        return any(name in FUSED_LINEARS for _, name in self.modules)

    @property
    def is_plain(self) -> bool:
        """Whether it holds the two factors of the layers' linears and nothing else."""
        return all(name in LINEARS and part in (A, B) for (_, name), part in self.tensors)

    @property
    def features(self) -> tuple[str, ...]:
        """What it does beyond plain LoRA, in words for people and programs."""
        outside = {name for layer, name in self.modules if layer < 0}
        trained = {name for _, name in self.with_part(WEIGHT)}
        found = {
            "rslora": self.config.use_rslora,
            "dora": bool(self.with_part(MAGNITUDE)),
            "lora_bias": bool(self.with_part(B_BIAS)),
            "bias": bool(self.with_part(BIAS)),
            "embedding_lora": "embed_tokens" in outside,
            "head_lora": "lm_head" in outside,
            "modules_to_save": bool(trained),
            "trainable_tokens": bool(self.with_part(TOKENS)),
        }
        return tuple(name for name, present in found.items() if present)


def read_layout(directory: Path) -> AdapterLayout:
    """Config and header of a directory, consistent with each other; no tensor is read.

    Raises: InvalidAdapter or UnsupportedAdapter with the reason.
    """
    refuse_other_weights(sorted(path.name for path in directory.iterdir()) if directory.is_dir() else [])
    config = read_config(directory)
    tensors: dict[TensorKey, tuple[str, TensorInfo]] = {}
    for name, info in read_header(directory / WEIGHTS_NAME).items():
        key = parse_tensor_name(name)
        if key[1] == ORIGINAL:
            continue
        if key in tensors:
            raise InvalidAdapter(
                f"Tensors {tensors[key][0]!r} and {name!r} are the same factor; save one adapter a file.",
                code="duplicate_tensor",
            )
        tensors[key] = (name, info)
    for module in [module for module, part in tensors if part == SAVED]:
        saved = tensors.pop((module, SAVED))
        tensors.setdefault((module, WEIGHT), saved)  # the newer name counts, as in peft
    if not tensors:
        raise InvalidAdapter(f"{WEIGHTS_NAME} holds no tensors.", code="no_tensors")
    scalings = {}
    for module in {module for module, part in tensors if part in (A, B, B_BIAS, MAGNITUDE)}:
        rank = _check_pair(config, tensors, module)
        scalings[module] = config.scaling(module, rank)
    layout = AdapterLayout(config, tensors, scalings)
    _check_fused(layout)
    _check_parts(layout)
    return layout


def refuse_other_weights(names: Sequence[str]) -> None:
    """Raise InvalidAdapter, saying what is there instead, unless ``names`` of files include safetensors weights."""
    if WEIGHTS_NAME in names:
        return
    if pickles := [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]:
        raise InvalidAdapter(
            f"{pickles[0][:80]!r} is a pickle, and pickles can run code: they are never opened. Save the adapter with "
            "save_pretrained(safe_serialization=True).",
            code="pickle_refused",
        )
    if any(name.startswith("adapter_model-") or name.endswith(".safetensors.index.json") for name in names):
        raise UnsupportedAdapter(f"The weights are sharded; save them as one {WEIGHTS_NAME}.", code="sharded")
    if CONFIG_NAME not in names:
        raise missing_config()
    raise InvalidAdapter(f"{WEIGHTS_NAME} is missing.", code="adapter_weights_missing")


def _check_pair(config: LoraConfig, tensors: Mapping[TensorKey, tuple[str, TensorInfo]], module: ModuleKey) -> int:
    """The module's rank, once its factors have been found to fit each other and the config."""
    path = module_path(*module)
    for factor in (A, B):
        if (module, factor) not in tensors:
            raise InvalidAdapter(f"lora_{factor} of {path} is missing.", code="factor_missing")
    a, b = tensors[module, A][1].shape, tensors[module, B][1].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
        raise InvalidAdapter(
            f"lora_A {list(a)} and lora_B {list(b)} of {path} do not multiply; [R, K] and [N, R] are needed.",
            code="shape_mismatch",
        )
    for part in (B_BIAS, MAGNITUDE):
        if (module, part) in tensors and tensors[module, part][1].shape != (b[0],):
            raise InvalidAdapter(
                f"The {part} of {path} has shape {list(tensors[module, part][1].shape)}; [{b[0]}] is needed.",
                code="shape_mismatch",
            )
    rank = config.rank(module)
    if rank is not None and rank != a[0]:
        raise InvalidAdapter(
            f"lora_A of {path} has rank {a[0]}, but {CONFIG_NAME} says {rank}: its scaling would be wrong.",
            code="rank_mismatch",
        )
    return a[0]


def _check_fused(layout: AdapterLayout) -> None:
    present = {module for module, _ in layout.tensors}
    for layer, name in present:
        for part in FUSED_LINEARS.get(name, ()):
            if (layer, part) in present:
                raise InvalidAdapter(
                    f"The file changes {module_path(layer, name)} and also {part}, which is a part of it.",
                    code="duplicate_tensor",
                )


def _check_parts(layout: AdapterLayout) -> None:
    """What goes with LoRA is there if and only if the config says so."""
    config, modules = layout.config, layout.modules
    if config.use_dora and config.lora_bias:
        raise InvalidAdapter(
            f"{CONFIG_NAME} sets both use_dora and lora_bias, which peft cannot train.", code="adapter_config_invalid"
        )
    for key, said, part in (("use_dora", config.use_dora, MAGNITUDE), ("lora_bias", config.lora_bias, B_BIAS)):
        if said and (lost := [module for module in modules if layout.info(module, part) is None]):
            raise InvalidAdapter(
                f"{CONFIG_NAME} sets {key}, but the file holds no {part} of {module_path(*lost[0])}.",
                code="tensors_missing",
            )
        if not said and (extra := layout.with_part(part)):
            raise _not_said(extra[0], part, f"{key} is not set")
    if config.bias == "none" and (extra := layout.with_part(BIAS)):
        raise _not_said(extra[0], BIAS, "bias is 'none'")
    _check_tokens(layout)
    if lost_names := [n for n in config.modules_to_save if not any(_ends(m, n) for m in layout.with_part(WEIGHT))]:
        raise InvalidAdapter(
            f"{CONFIG_NAME} names {sorted(lost_names)[0][:60]!r} in modules_to_save, but the file holds no weight of it.",
            code="tensors_missing",
        )
    for module in layout.with_part(WEIGHT):
        if module[1] not in ("embed_tokens", "lm_head") and not config.saves(module):
            raise _not_said(module, WEIGHT, "modules_to_save does not name it")


def _check_tokens(layout: AdapterLayout) -> None:
    present = layout.with_part(TOKENS)
    for module in present:
        info, tokens = layout.tensors[module, TOKENS][1], layout.tokens_of(module)
        if not tokens:
            raise _not_said(module, TOKENS, "trainable_token_indices does not name them")
        if len(info.shape) != 2 or info.shape[0] != len(tokens):
            raise InvalidAdapter(
                f"The trained tokens of {module_path(*module)} have shape {list(info.shape)}, but {CONFIG_NAME} names "
                f"{len(tokens)} tokens.",
                code="shape_mismatch",
            )
    said = layout.config.token_indices
    for module in said:
        # A head that shares the embeddings' rows has none of its own in the file.
        shares = module == HEAD and EMBED in present and said[module] == said.get(EMBED)
        if module not in present and not shares:
            raise InvalidAdapter(
                f"{CONFIG_NAME} trains tokens of {module_path(*module)}, but the file holds no rows for them.",
                code="tensors_missing",
            )


def _ends(module: ModuleKey, name: str) -> bool:
    return module_path(*module).endswith(name)


def _not_said(module: ModuleKey, part: str, why: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"The file holds the {part} of {module_path(*module)}, but in {CONFIG_NAME} {why}.", code="not_targeted"
    )
