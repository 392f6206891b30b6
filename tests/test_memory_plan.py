"""Dividing a machine's memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from loraplex_server.memory_plan import GIB, Machine, TooLittleMemory, kv_bytes_per_token, plan_memory
from loraplex_server.model.spec import ModelSpec
from loraplex_server.server_config import EngineConfig

LLAMA_8B = ModelSpec.from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 128001,
    }
)
DEFAULTS = EngineConfig(
    kv_cache_bytes=None,
    gpu_memory_utilization=0.9,
    adapter_bytes=None,
    host_adapter_bytes=None,
    block_size=16,
    max_running=64,
    max_waiting=512,
    max_waiting_tokens=1_000_000,
    max_batched_tokens=None,
    max_mixed_tokens=512,
    prefix_cache=True,
    seed=0,
    process="auto",
)


def plan(device_gib: float, *, device: str = "cuda", max_len: int | None = None, **config: Any) -> Any:
    machine = Machine(int(device_gib * GIB), int(64 * GIB))
    return plan_memory(replace(DEFAULTS, **config), LLAMA_8B, torch.bfloat16, torch.device(device), machine, max_len)


def test_a_token_of_llama_8b_takes_what_its_shape_says() -> None:
    assert kv_bytes_per_token(LLAMA_8B, torch.bfloat16) == 131072


@pytest.mark.parametrize("device_gib", [8, 16, 70, 120])
def test_all_parts_fit_into_what_is_free(device_gib: float) -> None:
    limits = plan(device_gib)
    kv = limits.kv_blocks * limits.block_size * 131072
    assert kv + limits.adapter_bytes <= device_gib * GIB
    assert limits.adapter_bytes <= 8 * GIB
    assert limits.max_model_len <= (limits.kv_blocks - 1) * limits.block_size
    assert limits.max_model_len <= LLAMA_8B.context_length


@pytest.mark.parametrize(("device_gib", "tokens"), [(120, 8192), (25, 4096), (12, 2048)])
def test_steps_are_as_large_as_the_device_is(device_gib: float, tokens: int) -> None:
    assert plan(device_gib).max_batched_tokens == tokens
    assert plan(device_gib, max_batched_tokens=512).max_batched_tokens == 512
    assert plan(device_gib, device="cpu").max_batched_tokens == 2048


def test_a_step_has_room_for_every_running_sequence() -> None:
    assert plan(24, device="cpu", max_running=4096).max_batched_tokens == 4096


def test_what_is_asked_for_is_given() -> None:
    limits = plan(70, adapter_bytes=3 * GIB, kv_cache_bytes=2 * GIB, host_adapter_bytes=5 * GIB, max_len=4096)
    assert limits.adapter_bytes == 3 * GIB
    assert limits.host_adapter_bytes == 5 * GIB
    assert limits.kv_blocks == 2 * GIB // (16 * 131072)
    assert limits.max_model_len == 4096


def test_the_cache_is_no_larger_than_all_sequences_at_full_length() -> None:
    assert plan(120, max_len=512).kv_blocks == 64 * 32 + 1


def test_a_small_cache_shortens_the_context_rather_than_failing_later() -> None:
    limits = plan(70, kv_cache_bytes=GIB)
    assert limits.max_model_len == (limits.kv_blocks - 1) * 16 < 131072


@pytest.mark.parametrize(
    ("device_gib", "asked", "says"),
    [
        (1.0, {}, "--kv-cache-memory"),
        (70, {"kv_cache_bytes": GIB, "max_len": 100_000}, "--max-model-len"),
        (70, {"max_len": 200_000}, "131072"),
        (10, {"adapter_bytes": 20 * GIB}, "--adapter-memory"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(device_gib: float, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(TooLittleMemory, match=says):
        plan(device_gib, **asked)


def test_a_cpu_keeps_most_of_its_memory_for_others() -> None:
    limits = plan(24, device="cpu")
    assert limits.kv_blocks * 16 * 131072 <= 2 * GIB
    assert limits.adapter_bytes == GIB // 2
