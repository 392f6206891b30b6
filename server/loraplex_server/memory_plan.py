"""How much memory each part of the server gets: what was asked for, or what the machine leaves."""

import os
from dataclasses import dataclass

import torch

from loraplex_server.engine.engine import EngineLimits
from loraplex_server.model.spec import ModelSpec
from loraplex_server.server_config import EngineConfig

GIB = 2**30
# Of what the base leaves on a GPU, the share set aside for adapters, and where that stops being useful.
_ADAPTER_SHARE, _ADAPTER_MOST = 0.25, 8 * GIB
_CPU_ADAPTERS, _CPU_KV_SHARE, _CPU_KV_MOST = GIB // 2, 0.25, 2 * GIB
_HOST_SHARE, _HOST_MOST = 0.25, 64 * GIB
# Tokens of a step, where nobody says: on a GPU the most whose activations take no more than a share of what is free.
_STEP_TOKENS, _STEP_SHARE, _FEWEST_STEP_TOKENS = (8192, 4096), 0.1, 2048


class TooLittleMemory(Exception):
    """What was asked for does not fit; the message says what takes how much, and which flag changes it."""


@dataclass(frozen=True)
class Machine:
    """Memory that the server finds, in bytes, once the base is loaded: free on the device within the share it may use,
    and free on the host."""

    device_free: int
    host_free: int


def inspect(device: torch.device, utilization: float) -> Machine:
    """Look at the machine; ``utilization`` is the share of a GPU's whole memory that the server may use."""
    host_free = _host_free()
    if device.type != "cuda":
        return Machine(host_free, host_free)
    free, total = torch.cuda.mem_get_info(device)
    # What torch has cached but does not use is free for us.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Machine(int(free + cached - (1 - utilization) * total), host_free)


def plan_memory(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    machine: Machine,
    max_len: int | None,
) -> EngineLimits:
    """Divide the machine. Raises TooLittleMemory.

    ``max_len``: the longest sequence asked for; None takes what the model and the KV cache allow.
    """
    on_gpu = device.type == "cuda"
    step_tokens = config.max_batched_tokens or _step_tokens(config, spec, dtype, machine if on_gpu else None)
    left = machine.device_free - (_activation_bytes(config, spec, dtype, step_tokens) if on_gpu else 0)
    adapters = config.adapter_bytes or (min(int(left * _ADAPTER_SHARE), _ADAPTER_MOST) if on_gpu else _CPU_ADAPTERS)
    block_bytes = config.block_size * kv_bytes_per_token(spec, dtype)
    kv = config.kv_cache_bytes
    if kv is None:
        kv = left - adapters if on_gpu else min(int(machine.host_free * _CPU_KV_SHARE), _CPU_KV_MOST)
        # More than every sequence at full length is of no use.
        full = config.max_running * -(-(max_len or spec.context_length) // config.block_size) + 1
        kv = min(kv, full * block_bytes)
    # One block is never handed out: padding points to it.
    num_blocks = kv // block_bytes
    room = (num_blocks - 1) * config.block_size
    wanted = min(max_len or spec.context_length, spec.context_length)
    if max_len is not None and max_len > spec.context_length:
        raise TooLittleMemory(
            f"--max-model-len {max_len} is more than the model's context of {spec.context_length} tokens"
        )
    if room < (max_len or min(wanted, 256)):
        raise TooLittleMemory(
            f"the KV cache has room for {max(room, 0)} tokens ({max(kv, 0) / GIB:.2f} GiB after the base, activations "
            f"and {adapters / GIB:.2f} GiB for adapters), and one request of {max_len or wanted} tokens does not fit; "
            "lower --max-model-len or --adapter-memory, or raise --gpu-memory-utilization or --kv-cache-memory"
        )
    host = config.host_adapter_bytes or min(int(machine.host_free * _HOST_SHARE), _HOST_MOST)
    return EngineLimits(
        max_model_len=min(wanted, room),
        kv_blocks=num_blocks,
        block_size=config.block_size,
        adapter_bytes=adapters,
        host_adapter_bytes=host,
        max_running=config.max_running,
        max_batched_tokens=step_tokens,
        max_mixed_tokens=config.max_mixed_tokens,
        prefix_cache=config.prefix_cache,
        seed=config.seed,
    )


def kv_bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize


def _step_tokens(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, machine: Machine | None) -> int:
    """Tokens of a step on a GPU, or on a CPU (``machine`` None)."""
    fits = (
        tokens
        for tokens in _STEP_TOKENS
        if machine and _activation_bytes(config, spec, dtype, tokens) <= _STEP_SHARE * machine.device_free
    )
    return max(next(fits, _FEWEST_STEP_TOKENS), config.max_running)


def _activation_bytes(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, step_tokens: int) -> int:
    """What one full step needs at its widest, with room for the allocator: the MLP's inner rows, shrunk rows of
    adapters, the logits of every sequence in float32 a few times over (filters, noise), and one dequantized matrix."""
    rows = step_tokens * (3 * spec.intermediate_size + 6 * spec.hidden_size + 2048) * dtype.itemsize
    logits = 6 * max(config.max_running, 256) * spec.vocab_size * 4
    largest = 2 * spec.intermediate_size * spec.hidden_size * dtype.itemsize
    return int(1.3 * (rows + logits + 2 * largest))


def _host_free() -> int:
    """Memory that processes may still take, page cache included."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
