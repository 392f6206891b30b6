"""CUDA C++ compiled at run time and launched on torch's current stream; needs only the wheels torch brings.

Machine code comes from ``nvrtc_build``. The only state kept here is what the driver itself keeps for the process: its
library, and loaded kernels by device and content hash; and, while one goes on, a plan of what will have to be built.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loraplex_server.kernels.nvrtc_build import Build, CompilerMissingError, KernelError, build, compiler_version

_ATTRIBUTE_CLUSTER = 4
_ATTRIBUTE_PROGRAMMATIC = 6
_FUNCTION_DYNAMIC_SHARED_BYTES = 8
_STATIC_SHARED_BYTES = 48 * 1024


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
def driver() -> ctypes.CDLL:
    """The CUDA driver's library. Raises: CompilerMissingError."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CompilerMissingError(f"no CUDA driver: {error}") from error


def check(result: int, what: str) -> None:
    """Raises: LaunchError if a driver's call, described by ``what``, gave anything but success."""
    if result:
        message = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(message))
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
        if self.handle == _PLANNED:
            return
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
        launched = driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(self.handle), pointers, None)
        check(launched, f"launch of {self.name}")


# The handle of a kernel that is only planned.
_PLANNED = 0

_plan: set[Build] | None = None


@contextmanager
def planning() -> Iterator[set[Build]]:
    """Inside, kernels that are not loaded yet are noted, neither built nor launched: what is computed means nothing.

    For one thread at a time, and outside of CUDA graph captures.
    """
    global _plan
    plan: set[Build] = set()
    _plan = plan
    try:
        yield plan
    finally:
        _plan = None


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
        arch = device_arch(device)
        if _plan is not None:
            _plan.add(Build(source, key[3], arch))
            return Kernel(name, _PLANNED, tuple(argtypes), block, shared_bytes, cluster)
        handle = _load_function(build(source, defines, arch), name, shared_bytes)
        _loaded[key] = handle
    return Kernel(name, handle, tuple(argtypes), block, shared_bytes, cluster)


def _load_function(cubin: bytes, name: str, shared_bytes: int) -> int:
    cuda, module, function = driver(), ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.current_stream()  # makes the device's context current on this thread
    check(cuda.cuModuleLoadData(ctypes.byref(module), cubin), f"load of {name}")
    check(cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"look-up of {name}")
    if shared_bytes > _STATIC_SHARED_BYTES:
        check(
            cuda.cuFuncSetAttribute(function, _FUNCTION_DYNAMIC_SHARED_BYTES, shared_bytes),
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
        driver()
        compiler_version()
    except CompilerMissingError:
        return False
    return True
