"""Writes a checkpoint with its linears changed, tensor by tensor: plain, or quantized as bitsandbytes stores NF4."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex_server.kernels.nf4 import Nf4Weight
from loraplex_server.model.checkpoint import Checkpoint
from loraplex_server.model.errors import BadCheckpoint
from loraplex_server.model.quantized import check_stored_quantization, nf4_tensor_names, read_nf4
from loraplex_server.model.reader import Progress, TensorReader
from loraplex_server.model.spec import ModelSpec, read_config
from loraplex_server.model.tensor_names import linear_path, stored_names, tensor_shapes

Linear = tuple[int, str]
"""(layer, linear name), for example (0, "q_proj")."""
ChangeLinear = Callable[[Linear, Tensor], Tensor]
"""Given a linear's weight [N, K] in float32, the weight to write."""

_INDEX_NAME: Final = "model.safetensors.index.json"
_KEPT_FILES: Final = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_SHARD_NAME: Final = "model-{:05d}-of-{:05d}.safetensors"


class Precision(StrEnum):
    """What the linears are written as. All other tensors keep their values, as bfloat16 or what was asked for."""

    BF16 = "bf16"
    NF4 = "nf4"


class Start(StrEnum):
    """What a change is added to: the weights as NF4 rounds them (which adapters see while served), or as stored."""

    NF4 = "nf4"
    STORED = "stored"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    num_bytes: int
    num_shards: int
    num_changed: int
    rounding: float
    """The largest relative Frobenius error that writing a changed linear in its precision added."""


def export(
    source: Path,
    target: Path,
    change: ChangeLinear,
    *,
    precision: Precision = Precision.BF16,
    start: Start = Start.NF4,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 2 * 10**9,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Exported:
    """Write the checkpoint ``source`` to the new folder ``target`` with ``change`` applied to each linear.

    Memory: one shard of at most ``shard_bytes`` (and never less than one tensor), and one linear in float32.
    ``device`` is where linears are quantized and changed. Everything is written beside ``target`` first and renamed.

    Raises: ModelError for a source that cannot be read, FileExistsError if ``target`` exists; OSError with nothing left
    behind.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    config = read_config(source)
    check_stored_quantization(config, "nf4")
    spec = ModelSpec.from_folder(source)
    checkpoint = Checkpoint.open(source)
    staged = target.with_name(f".{target.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        writer = _ShardWriter(staged, shard_bytes)
        worst, changed = 0.0, 0
        for name, linear, tensor in _tensors(spec, checkpoint, start, torch.device(device), progress):
            if linear is None:
                writer.add(name, tensor.to(dtype))
                continue
            new = change(linear, tensor)
            written, rounding = _in_precision(new, precision, dtype)
            for suffix, part in written.items():
                writer.add(name + suffix, part)
            if new is not tensor:
                worst, changed = max(worst, rounding), changed + 1
        writer.finish()
        _copy_files(source, staged)
        (staged / "config.json").write_text(json.dumps(_config(config, precision, dtype), indent=2) + "\n")
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return Exported(writer.num_bytes, writer.num_shards, changed, worst)


def _tensors(
    spec: ModelSpec, checkpoint: Checkpoint, start: Start, device: torch.device, progress: Progress | None
) -> Iterator[tuple[str, Linear | None, Tensor]]:
    """Every tensor by name; of linears' weights also which linear, and the weight in float32."""
    linears = {
        f"{linear_path(layer, linear)}.weight": (layer, linear)
        for layer in range(spec.num_layers)
        for linear in spec.linears
    }
    with TensorReader(checkpoint, stored_names(spec, checkpoint), device, progress) as reader:
        for name, shape in tensor_shapes(spec).items():
            parts = nf4_tensor_names(name, checkpoint.entries)
            if name not in linears:
                if len(parts) > 1:
                    raise BadCheckpoint(f"{name} is quantized; only linears of layers are")
                yield name, None, reader.take(name)
                continue
            if len(parts) > 1:
                weight = read_nf4(parts, reader.take, (shape[0], shape[1])).dequantize(torch.float32)
            else:
                weight = reader.take(name)
                if start is Start.NF4:
                    weight = Nf4Weight.quantize(weight).dequantize(torch.float32)
            yield name, linears[name], weight.float()


def _in_precision(weight: Tensor, precision: Precision, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """The tensors that hold ``weight``, by the suffix of its name, and the relative error of the rounding."""
    if precision is Precision.BF16:
        written = {"": weight.to(dtype)}
        rounded = written[""].float()
    else:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.to(dtype).contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        written = {"": packed, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}
        rounded = Nf4Weight.from_quant_state(packed, state).dequantize(torch.float32)
    norm = float(torch.linalg.vector_norm(weight))
    return written, float(torch.linalg.vector_norm(rounded - weight)) / norm if norm else 0.0


def _config(config: dict[str, Any], precision: Precision, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of what was written."""
    name = str(dtype).removeprefix("torch.")
    made = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    made["dtype"] = name
    if precision is Precision.NF4:
        made["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": name,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
        }
    return made


def _copy_files(source: Path, target: Path) -> None:
    """Tokenizer, templates and other small files, as they are; neither weights nor code."""
    for pattern in _KEPT_FILES:
        for path in source.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)


class _ShardWriter:
    """Collects tensors and writes them out whenever a shard is full."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.num_bytes = 0

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.cpu().contiguous()
        self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is pending, and give the shards their names and their index."""
        self._flush()
        total = len(self._shards)
        names = ["model.safetensors"] if total == 1 else [_SHARD_NAME.format(i, total) for i in range(1, total + 1)]
        for number, name in enumerate(names):
            self._path(number).rename(self._folder / name)
        if total > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self._folder / _INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        save_file(self._pending, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self.num_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"
