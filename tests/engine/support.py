"""Small pieces that the engine's tests build from."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraplex_adapters.base import BaseShape
from loraplex_adapters.format import AdapterWeights, LoraFactors, read
from loraplex_server.engine.engine import Engine, EngineLimits
from loraplex_server.engine.messages import Submit, TokenOutput
from loraplex_server.engine.residency import AdapterResidency, Limits
from loraplex_server.engine.sequence import Request, SamplingParams, Sequence, TokenLogprob
from loraplex_server.model.decoder import Decoder

BASE = BaseShape(
    model_type="llama",
    num_layers=2,
    linears={
        "q_proj": (16, 16),
        "k_proj": (8, 16),
        "v_proj": (8, 16),
        "o_proj": (16, 16),
        "gate_proj": (32, 16),
        "up_proj": (32, 16),
        "down_proj": (16, 32),
    },
    vocab_size=32,
    hidden_size=16,
    fingerprint="test",
)


def random_weights(ranks: Mapping[tuple[int, str], int], seed: int = 0, scaling: float = 0.5) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for (layer, linear), rank in ranks.items():
        n, k = BASE.linears[linear]
        a = torch.randn(rank, k, generator=generator)
        b = torch.randn(n, rank, generator=generator)
        factors[layer, linear] = LoraFactors(a, b, scaling)
    return AdapterWeights(factors)


def small_residency(
    weights: Mapping[str, AdapterWeights],
    *,
    device_bytes: int = 1 << 20,
    open_adapter: Callable[[str], AdapterWeights] | None = None,
) -> AdapterResidency:
    return AdapterResidency(
        open_adapter=open_adapter or (lambda digest: weights[digest]),
        base=BASE,
        limits=Limits(device_bytes, 1 << 30),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def settle(residency: AdapterResidency, timeout_s: float = 10.0) -> None:
    """Wait until no copy is running."""
    deadline = time.monotonic() + timeout_s
    residency.poll()
    while residency.num_copies_running:
        assert time.monotonic() < deadline, "a copy did not finish"
        time.sleep(0.001)
        residency.poll()


def make_sequence(
    name: str, num_prompt: int, *, adapter: str | None = None, arrival_s: float = 0.0, max_tokens: int = 8
) -> Sequence:
    """A sequence with a prompt of its own: no two names share a prefix."""
    seed = sum(name.encode()) * 1000
    prompt = tuple(seed + i for i in range(num_prompt))
    return Sequence(Request(name, prompt, SamplingParams(max_tokens=max_tokens), adapter), 0, arrival_s)


def real_engine(
    decoder: Decoder,
    adapters: Mapping[str, Path],
    *,
    eos_ids: frozenset[int] = frozenset(),
    clock: Callable[[], float] = time.monotonic,
    **limits: Any,
) -> Engine:
    """An engine whose adapters are PEFT folders, known by their names in place of digests."""
    defaults: dict[str, Any] = {
        "max_model_len": 256,
        "kv_blocks": 129,
        "block_size": 4,
        "adapter_bytes": 1 << 24,
        "host_adapter_bytes": 1 << 24,
        "max_running": 16,
        "max_batched_tokens": 64,
    }
    return Engine(
        decoder,
        decoder.base_shape,
        lambda name: read(adapters[name], decoder.base_shape),
        EngineLimits(**{**defaults, **limits}),
        eos_ids,
        clock=clock,
    )


@dataclass
class Collected:
    """Everything the engine said about one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)

    @property
    def last(self) -> TokenOutput:
        return self.outputs[-1]


def run(engine: Engine, requests: Iterable[Request], *, timeout_s: float = 60.0) -> dict[str, Collected]:
    """Submit requests together and step until all of them have ended."""
    found: dict[str, Collected] = {}
    for request in requests:
        found[request.id] = Collected()
        engine.handle(Submit(request))
    deadline = time.monotonic() + timeout_s
    while not all(c.outputs and c.last.finish_reason for c in found.values()):
        assert time.monotonic() < deadline, "the engine did not finish"
        for output in engine.step().outputs:
            collected = found[output.request_id]
            collected.outputs.append(output)
            collected.token_ids += output.token_ids
            collected.logprobs += output.logprobs
        if not engine.has_work:
            time.sleep(0.001)
    return found
