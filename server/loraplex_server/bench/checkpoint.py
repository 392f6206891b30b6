"""Random weights of a model's shape, in memory or on disk, and random adapters for them."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex_adapters import format as peft_format
from loraplex_adapters.base import BaseShape
from loraplex_adapters.format import AdapterWeights, LoraFactors
from loraplex_server.bench.shapes import base_shape_of, config_of, spec_of
from loraplex_server.model.tensor_names import tensor_shapes

_SHARD_BYTES = 2 * 10**9
_STD = 0.02


def write_config(folder: Path, shape: str) -> Path:
    """A folder with config.json alone, for ``load_format="dummy"``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    return folder


def write_checkpoint(folder: Path, shape: str, *, seed: int = 0) -> Path:
    """A random bfloat16 checkpoint in shards, made on the GPU where there is one and written while the next is made."""
    write_config(folder, shape)
    generator = _generator(seed)
    shards: list[list[str]] = [[]]
    saves: list[Future[None]] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        tensors: dict[str, Tensor] = {}
        size = 0
        for name, dims in tensor_shapes(spec_of(shape)).items():
            tensor = _norm_or_bias(name, dims) if len(dims) == 1 else _randn(dims, generator)
            if size + tensor.nbytes > _SHARD_BYTES and tensors:
                saves.append(pool.submit(_save, tensors, folder / _shard_name(len(shards))))
                shards.append([])
                tensors, size = {}, 0
            shards[-1].append(name)
            tensors[name] = tensor
            size += tensor.nbytes
        saves.append(pool.submit(_save, tensors, folder / _shard_name(len(shards))))
    for save in saves:
        save.result()
    weight_map = {name: _shard_name(number) for number, names in enumerate(shards, start=1) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def random_adapter(base: BaseShape, *, rank: int = 16, seed: int = 0) -> AdapterWeights:
    """An adapter on all linears of ``base``, in bfloat16 on the host, as a file would bring it."""
    generator = _generator(seed)
    factors = {}
    for layer in range(base.num_layers):
        for linear, (n, k) in base.linears.items():
            factors[layer, linear] = LoraFactors(_randn((rank, k), generator), _randn((n, rank), generator), 1.0)
    return AdapterWeights(factors)


def write_adapter(folder: Path, shape: str, *, rank: int = 16, seed: int = 0) -> Path:
    """``random_adapter`` as a PEFT folder."""
    weights = random_adapter(base_shape_of(shape), rank=rank, seed=seed)
    peft_format.write(folder, weights, base_model_name=shape)
    return folder


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)


def _randn(dims: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tensor = torch.empty(dims, dtype=torch.bfloat16, device=generator.device)
    return tensor.normal_(0, _STD, generator=generator).cpu()


def _norm_or_bias(name: str, dims: tuple[int, ...]) -> Tensor:
    return torch.full(dims, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"
