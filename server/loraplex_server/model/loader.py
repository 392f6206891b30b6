"""From a checkpoint to a decoder on the device: dense, or quantized to NF4 as it is read."""

from pathlib import Path
from typing import Literal

import torch

from loraplex_server.model.assembler import Assembler
from loraplex_server.model.checkpoint import Checkpoint
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.dummy import DummyTensors
from loraplex_server.model.fingerprint import fingerprint
from loraplex_server.model.quantized import Quantization, check_stored_quantization
from loraplex_server.model.reader import Progress, TensorReader
from loraplex_server.model.source import resolve
from loraplex_server.model.spec import ModelSpec, read_config
from loraplex_server.model.tensor_names import stored_names

__all__ = ["LoadFormat", "Progress", "Quantization", "load", "pick_dtype"]

LoadFormat = Literal["auto", "dummy"]


def load(
    model: str | Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    quantization: Quantization = "nf4",
    load_format: LoadFormat = "auto",
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Load ``model``, a folder or a Hub id, onto ``device``.

    ``dtype`` is that of activations and dense weights; None picks one for the device (``pick_dtype``).
    ``quantization`` "nf4" rounds every linear of attention and MLP to NF4 with double quantization as it is read, and
    takes checkpoints that bitsandbytes saved in 4 bits as they are. ``load_format`` "dummy" reads config.json alone and
    makes random weights from a fixed seed. Memory beyond the result is at most two tensors.
    Raises: ModelError.
    """
    device = torch.device(device)
    folder = resolve(model, revision=revision, token=token, weights=load_format == "auto")
    spec = ModelSpec.from_folder(folder)
    dtype = dtype or pick_dtype(device)
    check_stored_quantization(read_config(folder), quantization)
    if load_format == "dummy":
        dummy = DummyTensors(spec, dtype, device, progress)
        assembler = Assembler(spec, dummy, dtype=dtype, device=device, quantization=quantization)
        return assembler.build(fingerprint(spec, None))
    checkpoint = Checkpoint.open(folder)
    with TensorReader(checkpoint, stored_names(spec, checkpoint), device, progress) as reader:
        assembler = Assembler(spec, reader, dtype=dtype, device=device, quantization=quantization)
        return assembler.build(fingerprint(spec, checkpoint))


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it fast; else float16 on a GPU and float32 on a CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bf16() -> bool:
    # Older torch cannot say; float32 is right on any CPU.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16", False))
