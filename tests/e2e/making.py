"""Adapters for the demo model: good ones, and every kind of bad one."""

import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from loraplex_server.demo import DEMO_ADAPTERS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def copy_of(name: str, folder: Path, *, config: Mapping[str, object] | None = None) -> Path:
    """A folder with one of the demo's adapters; ``config`` replaces fields of its configuration."""
    shutil.copytree(DEMO_ADAPTERS[name], folder)
    if config:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def unique(folder: Path, seed: int, name: str = "emoji") -> Path:
    """A working adapter whose content no other test has: ``name`` with a little noise."""
    copy_of(name, folder)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    noisy = {key: value + 1e-4 * torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
    save_file(noisy, folder / WEIGHTS)
    return folder


def with_tensors(folder: Path, change: object) -> Path:
    """``emoji`` whose tensors went through ``change``, a function of the dictionary of tensors."""
    copy_of("emoji", folder)
    tensors = load_file(folder / WEIGHTS)
    assert callable(change)
    save_file(change(tensors), folder / WEIGHTS)
    return folder


def zipped(folder: Path, **more: bytes) -> bytes:
    """The folder's files as a .zip."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return zip_of({**files, **more})


def zip_of(files: Mapping[str, bytes]) -> bytes:
    """A .zip of these files, whatever their names."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()
