"""Checkpoints that are quantized already: which are taken, and how bitsandbytes' 4-bit tensors are read."""

from collections.abc import Callable, Collection
from typing import Any, Final, Literal

from torch import Tensor, uint8

from loraplex_server.kernels.nf4 import Nf4FormatError, Nf4Weight
from loraplex_server.model.errors import BadCheckpoint, UnsupportedModel

Quantization = Literal["nf4", "none"]

_STATE_SUFFIX: Final = ".quant_state.bitsandbytes__nf4"
_SUFFIXES: Final = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE_SUFFIX)


def check_stored_quantization(config: dict[str, Any], wanted: Quantization) -> None:
    """Raises: UnsupportedModel when the checkpoint of this config.json is stored in a form that cannot be ``wanted``."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in quantization else "unknown")
    if method != "bitsandbytes":
        raise UnsupportedModel(
            f"the checkpoint is quantized with {method}; take its bf16 original, which is quantized to NF4 on load"
        )
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    if not quantization.get("load_in_4bit") or kind != "nf4":
        stored = f"4-bit {kind}" if quantization.get("load_in_4bit") else "8-bit"
        raise UnsupportedModel(f"the checkpoint is bitsandbytes {stored}; of bitsandbytes only nf4 is served")
    if wanted == "none":
        raise UnsupportedModel("the checkpoint is stored as NF4, so it cannot be served with quantization 'none'")


def nf4_tensor_names(weight: str, stored: Collection[str]) -> tuple[str, ...]:
    """``weight`` and the names of the tensors that hold its quantization; ``weight`` alone if it is not quantized."""
    return (weight, *(weight + suffix for suffix in _SUFFIXES if weight + suffix in stored))


def read_nf4(names: tuple[str, ...], take: Callable[[str], Tensor], shape: tuple[int, int]) -> Nf4Weight:
    """Build one matrix from the tensors of ``nf4_tensor_names``, taken in that order.

    Raises: BadCheckpoint if they do not form an NF4 matrix of ``shape`` in blocks of 64.
    """
    weight = names[0]
    tensors = {name: take(name) for name in names}
    if weight + _STATE_SUFFIX not in tensors:
        raise BadCheckpoint(f"{weight} is quantized, but not as NF4")
    from bitsandbytes.functional import QuantState

    packed = tensors.pop(weight)
    try:
        state = QuantState.from_dict(tensors, device=packed.device)
        found = Nf4Weight.from_quant_state(packed.contiguous().view(uint8), state)
    except (Nf4FormatError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{weight}: {error}") from error
    if found.shape != shape:
        raise BadCheckpoint(f"{weight} has shape {found.shape}, the config says {shape}")
    return found
