"""Machine code of CUDA C++ sources by NVRTC, kept on disk; without torch, so that processes of their own can build.

NVRTC is found in torch's wheels (or on the library path), so no CUDA toolkit is installed. Machine code is kept under
``$LORAPLEX_CACHE_DIR`` (else ``$XDG_CACHE_HOME/loraplex``, else ``~/.cache/loraplex``), named by the hash of source,
headers, options and compiler version: a changed kernel can never meet a stale binary.

    python -m loraplex_server.kernels.nvrtc_build BUILDS

BUILDS is a JSON list of [source, defines, architecture].
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent / "cuda"


class Build(NamedTuple):
    """One machine code: a source under ``cuda/``, its macros, and the architecture."""

    source: str
    defines: tuple[tuple[str, int], ...]
    arch: str


class KernelError(RuntimeError):
    """A GPU kernel could not be built, loaded or launched."""


class CompilerMissingError(KernelError):
    """No NVRTC or no CUDA driver on this machine."""


class CompileError(KernelError):
    """NVRTC rejected a source; the message carries its log."""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    roots: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    if spec is not None:
        roots = list(spec.submodule_search_locations or ())
    found = sorted((path for root in roots for path in Path(root).glob("*/lib/libnvrtc.so.1*")), reverse=True)
    for path in found:
        try:
            # NVRTC opens its builtins by name; loading them first spares a library path.
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilerMissingError("NVRTC was not found: install torch with CUDA, or the nvidia-cuda-nvrtc wheel")


def cache_dir() -> Path:
    """Where compiled kernels are kept on disk."""
    chosen = os.environ.get("LORAPLEX_CACHE_DIR")
    if chosen:
        return Path(chosen) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "loraplex" / "kernels"


@functools.cache
def compiler_version() -> str:
    """NVRTC's version, such as ``13.0``. Raises: CompilerMissingError."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@functools.cache
def _read(name: str) -> str:
    return (SOURCE_DIR / name).read_text()


def _headers() -> list[str]:
    return sorted(path.name for path in SOURCE_DIR.glob("*.cuh"))


def build(source: str, defines: Mapping[str, int], arch: str) -> bytes:
    """Machine code of ``cuda/<source>`` for ``arch`` (such as ``sm_90a``), from the disk cache or compiled now.

    Raises: CompilerMissingError, CompileError.
    """
    options = _options(defines, arch)
    path = _path(source, options)
    try:
        return path.read_bytes()
    except OSError:
        cubin = _compile(source, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("compiled kernels are not kept: %s", error)
    return cubin


def build_all(builds: Collection[Build]) -> None:
    """Compile what is not on disk yet, in processes side by side: NVRTC compiles one source at a time in each.

    What fails here fails again, with its reason, where it is needed.
    """
    missing = [each for each in builds if not _path(each.source, _options(dict(each.defines), each.arch)).exists()]
    num_processes = min(len(missing), os.cpu_count() or 1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", __spec__.name]
    processes = [
        subprocess.Popen([*command, json.dumps(missing[i::num_processes])], env=environment, stderr=subprocess.DEVNULL)
        for i in range(num_processes)
    ]
    for process in processes:
        process.wait()


def _options(defines: Mapping[str, int], arch: str) -> list[str]:
    # In one order, for the order is part of the name.
    macros = (f"-D{key}={value}" for key, value in sorted(defines.items()))
    return [f"--gpu-architecture={arch}", "--std=c++17", *macros]


def _path(source: str, options: Sequence[str]) -> Path:
    digest = hashlib.sha256()
    for text in (compiler_version(), *options, _read(source), *map(_read, _headers())):
        digest.update(text.encode() + b"\0")
    return cache_dir() / f"{digest.hexdigest()}.cubin"


def _compile(source: str, options: Sequence[str]) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    names = _headers()
    texts = (ctypes.c_char_p * len(names))(*(_read(name).encode() for name in names))
    includes = (ctypes.c_char_p * len(names))(*(name.encode() for name in names))
    text, label = _read(source).encode(), source.encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, label, len(names), texts, includes):
        raise CompileError(f"NVRTC could not take {source}")
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        size = ctypes.c_size_t()
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            buffer = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, buffer)
            raise CompileError(f"{source} with {' '.join(options)}:\n{buffer.value.decode(errors='replace')}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


if __name__ == "__main__":
    for source, defines, arch in json.loads(sys.argv[1]):
        build(source, dict(defines), arch)
