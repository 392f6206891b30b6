"""PEFT LoRA directories: read strictly. Safetensors only; nothing is ever unpickled."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraplex_adapters.base import EMBED, BaseShape, module_path
from loraplex_adapters.errors import InvalidAdapter
from loraplex_adapters.fit import check_base
from loraplex_adapters.layout import (
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    AdapterLayout,
    read_layout,
    refuse_other_weights,
)
from loraplex_adapters.tensor_names import B_BIAS, BIAS, MAGNITUDE, TOKENS, WEIGHT, A, B, TensorKey
from loraplex_adapters.weights import AdapterWeights, LoraFactors, TokenRows
from loraplex_adapters.writing import write

__all__ = [
    "PICKLE_SUFFIXES",
    "WEIGHTS_NAME",
    "AdapterLayout",
    "AdapterWeights",
    "LoraFactors",
    "TokenRows",
    "check_base",
    "read",
    "read_layout",
    "read_trusted",
    "refuse_other_weights",
    "write",
]

_FINITE_CHUNK = 1 << 22


def read(directory: Path, base: BaseShape) -> AdapterWeights:
    """Read a PEFT LoRA directory, checking every tensor against ``base``, by the base's own modules.

    Raises: InvalidAdapter, UnsupportedAdapter or WrongBase with the reason.
    """
    layout = read_layout(directory)
    check_base(layout, base)
    weights = read_trusted(directory, layout)
    for what, module, tensor in weights.tensors():
        if not _all_finite(tensor):
            raise InvalidAdapter(
                f"{what} of {module_path(*module)} holds NaN or infinity; the training diverged or the file is damaged.",
                code="not_finite",
            )
    return weights.for_base(base)


def read_trusted(directory: Path, layout: AdapterLayout | None = None) -> AdapterWeights:
    """Map the tensors of a directory that has been checked before; reads none of their bytes (except 8-bit ones).

    By the modules that the file names; see ``AdapterWeights.for_base``.
    """
    layout = layout or read_layout(directory)
    config = layout.config
    try:
        with safe_open(directory / WEIGHTS_NAME, framework="pt", device="cpu") as file:
            held: dict[TensorKey, Tensor] = {
                key: _widened(file.get_tensor(name)) for key, (name, _) in layout.tensors.items()
            }
    except SafetensorError as error:
        raise InvalidAdapter(f"{WEIGHTS_NAME} cannot be read: {str(error)[:200]}.", code="weights_broken") from None
    return AdapterWeights(
        factors={
            m: LoraFactors(held[m, A], held[m, B], layout.scalings[m], held.get((m, MAGNITUDE)), held.get((m, B_BIAS)))
            for m in layout.modules
        },
        biases={m: held[m, BIAS] for m in layout.with_part(BIAS)},
        whole={m: held[m, WEIGHT] for m in layout.with_part(WEIGHT)},
        rows={m: TokenRows(layout.tokens_of(m), held[m, TOKENS]) for m in layout.with_part(TOKENS)},
        ties_whole=config.ensure_weight_tying or not config.saves(EMBED),
        ties_lora=config.ensure_weight_tying,
    )


def _widened(tensor: Tensor) -> Tensor:
    """8-bit floats as bfloat16, which holds each of their values exactly."""
    return tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor


def _all_finite(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    return all(bool(flat[i : i + _FINITE_CHUNK].isfinite().all()) for i in range(0, flat.numel(), _FINITE_CHUNK))
