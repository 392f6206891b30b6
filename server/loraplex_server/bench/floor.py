"""The least time a decode step can take: the bytes that it must read over the rate at which the device copies."""

import time
from collections.abc import Sequence
from statistics import median

import torch

from loraplex_server.memory_plan import kv_bytes_per_token
from loraplex_server.model.spec import ModelSpec

# NF4 with double quantization: 4 bits a weight, 8 for each 64 weights, 32 for each 256 of those.
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}


def weight_bytes(spec: ModelSpec, dtype: torch.dtype, quantization: str) -> float:
    """What a step reads of the base: every linear, and the head once."""
    linears = spec.num_layers * sum(n * k for n, k in spec.linears.values())
    bits = _NF4_BITS if quantization == "nf4" else 8 * dtype.itemsize
    return linears * bits / 8 + spec.vocab_size * spec.hidden_size * dtype.itemsize


def adapter_bytes(spec: ModelSpec, dtype: torch.dtype, rank: int) -> int:
    """One adapter of this rank on all linears."""
    return spec.num_layers * sum((n + k) * rank for n, k in spec.linears.values()) * dtype.itemsize


def decode_bytes(
    spec: ModelSpec, dtype: torch.dtype, quantization: str, *, batch: int, tokens: float, ranks: Sequence[int]
) -> float:
    """One step of ``batch`` sequences of ``tokens`` tokens each; ``ranks`` are those of its distinct adapters."""
    keys = batch * tokens * kv_bytes_per_token(spec, dtype)
    return weight_bytes(spec, dtype, quantization) + keys + sum(adapter_bytes(spec, dtype, rank) for rank in ranks)


def copy_bytes_per_s(device: torch.device) -> float:
    """How fast this device copies its own memory, bytes read plus bytes written; the best that streaming reaches."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        started = _now(device)
        target.copy_(source)
        times.append(_now(device) - started)
    return 2 * source.nbytes / median(times[2:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
