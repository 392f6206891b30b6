"""PEFT LoRA directories: read strictly, written exactly. Safetensors only; nothing is ever unpickled."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraplex_adapters.base import BaseShape, ModuleKey, module_path
from loraplex_adapters.errors import InvalidAdapter, UnsupportedAdapter, WrongBase
from loraplex_adapters.header import TensorInfo, read_header
from loraplex_adapters.lora_config import CONFIG_NAME, LoraConfig, missing_config, read_config
from loraplex_adapters.tensor_names import parse_tensor_name

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")

_FINITE_CHUNK = 1 << 22


@dataclass(frozen=True)
class LoraFactors:
    """One linear's low-rank update, ``scaling * b @ a``.

    Shapes: a [R, K], b [N, R]. ``scaling`` is alpha / R, or alpha / sqrt(R) for rsLoRA, and not folded into b.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterWeights:
    """All factors of one adapter. Tensors read from a file are memory-mapped and must not be written to."""

    factors: Mapping[ModuleKey, LoraFactors]

    @property
    def ranks(self) -> dict[ModuleKey, int]:
        """Each module's true rank."""
        return {module: factors.rank for module, factors in self.factors.items()}

    @property
    def max_rank(self) -> int:
        return max(factors.rank for factors in self.factors.values())

    @property
    def num_parameters(self) -> int:
        return sum(factors.a.numel() + factors.b.numel() for factors in self.factors.values())

    @property
    def num_bytes(self) -> int:
        return sum(factors.a.nbytes + factors.b.nbytes for factors in self.factors.values())


@dataclass(frozen=True)
class AdapterLayout:
    """What a directory says before any tensor is touched: its config, and where each factor lies in the file."""

    config: LoraConfig
    tensors: Mapping[tuple[ModuleKey, str], tuple[str, TensorInfo]]
    """(module, "A" or "B") -> (name in the file, dtype, shape and offsets)."""
    scalings: Mapping[ModuleKey, float]

    @property
    def modules(self) -> list[ModuleKey]:
        return sorted({module for module, _ in self.tensors})

    def rank(self, module: ModuleKey) -> int:
        return self.tensors[module, "A"][1].shape[0]


def read(directory: Path, base: BaseShape) -> AdapterWeights:
    """Read a PEFT LoRA directory, checking every tensor against ``base``.

    Raises: InvalidAdapter, UnsupportedAdapter or WrongBase with the reason.
    """
    layout = read_layout(directory)
    check_base(layout, base)
    weights = read_trusted(directory, layout)
    for (layer, linear), factors in weights.factors.items():
        for factor, tensor in (("A", factors.a), ("B", factors.b)):
            if not _all_finite(tensor):
                raise InvalidAdapter(
                    f"lora_{factor} of {module_path(layer, linear)} holds NaN or infinity; the training diverged or "
                    "the file is damaged.",
                    code="not_finite",
                )
    return weights


def read_layout(directory: Path) -> AdapterLayout:
    """Config and header of a directory, consistent with each other; no tensor is read."""
    refuse_other_weights(sorted(path.name for path in directory.iterdir()) if directory.is_dir() else [])
    config = read_config(directory)
    tensors: dict[tuple[ModuleKey, str], tuple[str, TensorInfo]] = {}
    for name, info in read_header(directory / WEIGHTS_NAME).items():
        key = parse_tensor_name(name)
        if key in tensors:
            raise InvalidAdapter(
                f"Tensors {tensors[key][0]!r} and {name!r} are the same factor; save one adapter a file.",
                code="duplicate_tensor",
            )
        tensors[key] = (name, info)
    if not tensors:
        raise InvalidAdapter(f"{WEIGHTS_NAME} holds no tensors.", code="no_tensors")
    scalings = {}
    for module in {module for module, _ in tensors}:
        rank = _check_pair(config, tensors, module)
        scalings[module] = config.scaling(module, rank)
    return AdapterLayout(config, tensors, scalings)


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


def _check_pair(
    config: LoraConfig, tensors: Mapping[tuple[ModuleKey, str], tuple[str, TensorInfo]], module: ModuleKey
) -> int:
    """The module's rank, once its two factors have been found to fit each other and the config."""
    path = module_path(*module)
    for factor in "AB":
        if (module, factor) not in tensors:
            raise InvalidAdapter(f"lora_{factor} of {path} is missing.", code="factor_missing")
    a, b = tensors[module, "A"][1].shape, tensors[module, "B"][1].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
        raise InvalidAdapter(
            f"lora_A {list(a)} and lora_B {list(b)} of {path} do not multiply; [R, K] and [N, R] are needed.",
            code="shape_mismatch",
        )
    rank = config.rank(module)
    if rank is not None and rank != a[0]:
        raise InvalidAdapter(
            f"lora_A of {path} has rank {a[0]}, but {CONFIG_NAME} says {rank}: its scaling would be wrong.",
            code="rank_mismatch",
        )
    return a[0]


def check_base(layout: AdapterLayout, base: BaseShape) -> None:
    """Raise WrongBase or InvalidAdapter unless every factor fits ``base`` and every targeted linear has its factors."""
    for module in layout.modules:
        layer, linear = module
        if layer >= base.num_layers or linear not in base.linears:
            raise WrongBase(
                f"The adapter changes {module_path(*module)}, but the base has {base.num_layers} layers with "
                f"{', '.join(base.linears)}: it was made for another base.",
                code="module_not_in_base",
            )
        n, k = base.linears[linear]
        a, b = layout.tensors[module, "A"][1].shape, layout.tensors[module, "B"][1].shape
        if (b[0], a[1]) != (n, k):
            raise WrongBase(
                f"The adapter's {module_path(*module)} is {b[0]} x {a[1]}, the base's is {n} x {k}: it was made for "
                "another base.",
                code="shape_mismatch",
            )
    targets = layout.config.targets(base)
    if targets is None:
        return
    present = set(layout.modules)
    if extra := sorted(present - targets):
        raise InvalidAdapter(
            f"The file holds factors for {module_path(*extra[0])}, which {CONFIG_NAME} does not target.",
            code="not_targeted",
        )
    if lost := sorted(targets - present):
        raise InvalidAdapter(
            f"{CONFIG_NAME} targets {module_path(*lost[0])}, but the file holds no factors for it "
            f"({len(lost)} linears in all). If that is meant, name in target_modules and layers_to_transform only what "
            "the file holds.",
            code="tensors_missing",
        )


def read_trusted(directory: Path, layout: AdapterLayout | None = None) -> AdapterWeights:
    """Map the factors of a directory that has been checked before; reads no tensor's bytes (except 8-bit ones)."""
    layout = layout or read_layout(directory)
    factors = {}
    try:
        with safe_open(directory / WEIGHTS_NAME, framework="pt", device="cpu") as file:
            for module in layout.modules:
                a, b = (_widened(file.get_tensor(layout.tensors[module, factor][0])) for factor in "AB")
                factors[module] = LoraFactors(a, b, layout.scalings[module])
    except SafetensorError as error:
        raise InvalidAdapter(f"{WEIGHTS_NAME} cannot be read: {str(error)[:200]}.", code="weights_broken") from None
    return AdapterWeights(factors)


def _widened(tensor: Tensor) -> Tensor:
    """8-bit floats as bfloat16, which holds each of their values exactly."""
    return tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor


def _all_finite(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    return all(bool(flat[i : i + _FINITE_CHUNK].isfinite().all()) for i in range(0, flat.numel(), _FINITE_CHUNK))


def write(directory: Path, weights: AdapterWeights, *, base_model_name: str | None = None) -> None:
    """Write ``weights`` as a PEFT LoRA directory, the inverse of ``read``.

    Ranks and alphas that differ between modules go to rank_pattern and alpha_pattern; scalings come back to within
    one rounding of a float64.
    """
    directory.mkdir(parents=True, exist_ok=True)
    alphas = {module: factors.scaling * factors.rank for module, factors in weights.factors.items()}
    r = Counter(weights.ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    layers = sorted({layer for layer, _ in weights.factors})
    linears = sorted({linear for _, linear in weights.factors})
    full = len(layers) * len(linears) == len(weights.factors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "bias": "none",
        "target_modules": linears if full else [module_path(*module) for module in sorted(weights.factors)],
        "layers_to_transform": layers if full else None,
        "rank_pattern": {module_path(*m): rank for m, rank in weights.ranks.items() if rank != r},
        "alpha_pattern": {module_path(*m): value for m, value in alphas.items() if value != alpha},
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for module, factors in weights.factors.items():
        prefix = f"base_model.model.{module_path(*module)}"
        tensors[f"{prefix}.lora_A.weight"] = factors.a.detach().cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = factors.b.detach().cpu().contiguous()
    with contextlib.suppress(FileNotFoundError):
        (directory / WEIGHTS_NAME).unlink()  # a map of the old file stays valid
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
