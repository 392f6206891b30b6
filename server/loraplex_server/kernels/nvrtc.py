"""CUDA C++ compiled at run time and launched on torch's current stream; needs only the wheels torch brings.

NVRTC is found in torch's wheels (or on the library path), so no CUDA toolkit is installed. Machine code is kept under
``$LORAPLEX_CACHE_DIR`` (else ``$XDG_CACHE_HOME/loraplex``, else ``~/.cache/loraplex``), named by the hash of source,
headers, options and compiler version: a changed kernel can never meet a stale binary.

The only state kept here is what the driver itself keeps for the process: the two libraries, and loaded kernels by
device and content hash.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent / "cuda"

_ATTRIBUTE_CLUSTER = 4
_ATTRIBUTE_PROGRAMMATIC = 6
_FUNCTION_DYNAMIC_SHARED_BYTES = 8
_STATIC_SHARED_BYTES = 48 * 1024


class KernelError(RuntimeError):
    """A GPU kernel could not be built, loaded or launched."""


class CompilerMissingError(KernelError):
    """No NVRTC or no CUDA driver on this machine."""


class CompileError(KernelError):
    """NVRTC rejected a source; the message carries its log."""


class LaunchError(KernelError):
    """The CUDA driver refused a load or a launch."""


class _Config(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")],
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


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


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CompilerMissingError(f"no CUDA driver: {error}") from error


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
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{key}={value}" for key, value in defines.items())]
    digest = hashlib.sha256()
    for text in (compiler_version(), *options, _read(source), *map(_read, _headers())):
        digest.update(text.encode() + b"\0")
    path = cache_dir() / f"{digest.hexdigest()}.cubin"
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


def _check(result: int, what: str) -> None:
    if result:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(message))
        raise LaunchError(f"{what}: {(message.value or b'unknown error').decode()} ({result})")


@dataclass(frozen=True)
class Kernel:
    """One loaded kernel: its function handle, its parameters' C types, and how it is launched."""

    name: str
    handle: int
    argtypes: tuple[Any, ...]
    block: int
    shared_bytes: int
    cluster: int

    def launch(self, grid: int, args: Sequence[int | float | ctypes.Structure], *, dependent: bool = False) -> None:
        """Launch on torch's current stream (also while a CUDA graph is captured).

        ``dependent``: the launch may begin before the stream's previous kernel ends (programmatic dependent launch);
        the kernel itself waits before it touches what that one writes.
        Raises: LaunchError.
        """
        attributes = (_Attribute * 2)()
        count = 0
        if self.cluster > 1:
            attributes[count].id = _ATTRIBUTE_CLUSTER
            attributes[count].value[:3] = [self.cluster, 1, 1]
            count += 1
        if dependent:
            attributes[count].id = _ATTRIBUTE_PROGRAMMATIC
            attributes[count].value[0] = 1
            count += 1
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(grid, 1, 1, self.block, 1, 1, self.shared_bytes, stream, ctypes.addressof(attributes), count)
        values = [
            value if isinstance(value, ctypes.Structure) else kind(value)
            for kind, value in zip(self.argtypes, args, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        launched = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(self.handle), pointers, None)
        _check(launched, f"launch of {self.name}")


_loaded: dict[tuple[int, str, str, tuple[tuple[str, int], ...]], int] = {}


def load(
    source: str,
    name: str,
    argtypes: Sequence[Any],
    *,
    defines: Mapping[str, int],
    block: int,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> Kernel:
    """Build ``cuda/<source>`` for the current device and load ``name`` from it.

    Must first be called outside CUDA graph capture: loading allocates on the device.
    Raises: CompilerMissingError, CompileError, LaunchError.
    """
    device = torch.cuda.current_device()
    key = (device, source, name, tuple(sorted(defines.items())))
    handle = _loaded.get(key)
    if handle is None:
        if torch.cuda.is_current_stream_capturing():
            raise LaunchError(f"{name} must be loaded before a CUDA graph is captured: run it once first")
        handle = _load_function(build(source, defines, device_arch(device)), name, shared_bytes)
        _loaded[key] = handle
    return Kernel(name, handle, tuple(argtypes), block, shared_bytes, cluster)


def _load_function(cubin: bytes, name: str, shared_bytes: int) -> int:
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.current_stream()  # makes the device's context current on this thread
    _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), f"load of {name}")
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"look-up of {name}")
    if shared_bytes > _STATIC_SHARED_BYTES:
        _check(
            driver.cuFuncSetAttribute(function, _FUNCTION_DYNAMIC_SHARED_BYTES, shared_bytes),
            f"{shared_bytes} bytes of shared memory for {name}",
        )
    if function.value is None:
        raise LaunchError(f"look-up of {name} gave no function")
    return function.value


@functools.cache
def device_arch(device: int) -> str:
    """The compiler's name for a device, with Hopper's and later chips' own instructions (``sm_90a``)."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def available() -> bool:
    """Whether kernels can be compiled and launched here."""
    if not torch.cuda.is_available():
        return False
    try:
        _driver()
        compiler_version()
    except CompilerMissingError:
        return False
    return True
