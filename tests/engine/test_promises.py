"""Two promises of the engine: the base never changes, and a mixed batch answers as each request alone."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_adapters.format import AdapterWeights, LoraFactors, read
from loraplex_server.engine.engine import Engine, EngineLimits
from loraplex_server.engine.messages import Abort, Pin, Release, Submit, Warm
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.engine.support import real_engine, run
from tests.models import make_adapter, make_checkpoint

NUM_CHANGES = 1000


@pytest.fixture(scope="module", params=["nf4", "none"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = make_checkpoint(tmp_path_factory.mktemp("base"), "qwen3", seed=4)
    return load(path, device=torch.device("cpu"), dtype=torch.float32, quantization=request.param)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    checkpoint = make_checkpoint(folder / "base", "qwen3", seed=4)
    return {
        "all-8": make_adapter(folder / "all-8", checkpoint, rank=8, seed=1),
        "qv-3": make_adapter(
            folder / "qv-3", checkpoint, rank=3, targets=("q_proj", "v_proj"), seed=2, use_rslora=True
        ),
        "mlp-16": make_adapter(folder / "mlp-16", checkpoint, rank=16, targets=("up_proj", "down_proj"), seed=3),
    }


def test_the_base_is_the_same_bytes_after_a_thousand_mixed_loads_uses_drops_and_failures(
    decoder: Decoder, adapters: dict[str, Path]
) -> None:
    whole = {name: read(path, decoder.base_shape) for name, path in adapters.items()}
    rng = random.Random(11)

    def open_adapter(digest: str) -> AdapterWeights:
        if digest.startswith("missing"):
            raise FileNotFoundError(digest)
        weights = whole[digest.partition("#")[0]]
        if "#nan" in digest:
            spoiled = {key: LoraFactors(f.a * float("nan"), f.b, f.scaling) for key, f in weights.factors.items()}
            return AdapterWeights(spoiled)
        return weights

    # Room for about two adapters on the device and one on the host, so that most loads evict another.
    limits = EngineLimits(
        max_model_len=64,
        kv_blocks=40,
        block_size=4,
        adapter_bytes=200_000,
        host_adapter_bytes=60_000,
        max_running=4,
        max_batched_tokens=16,
    )
    engine = Engine(decoder, decoder.base_shape, open_adapter, limits, frozenset())
    before = decoder.hash_weights()
    digests = [*whole, *(f"{name}#{copy}" for name in whole for copy in ("1", "2", "nan")), "missing-1", "missing-2"]
    outcomes: dict[str, str] = {}
    for number in range(NUM_CHANGES):
        digest = rng.choice(digests)
        match rng.randrange(6):
            case 0:
                engine.handle(Warm(number, digest))
            case 1:
                engine.handle(Release(number, digest))
            case 2:
                engine.handle(Pin(digest, rng.random() < 0.1))
            case 3:
                engine.handle(Abort(f"r{rng.randrange(number + 1)}"))
            case _:
                prompt = tuple(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
                adapter = None if rng.random() < 0.2 else digest
                engine.handle(Submit(Request(f"r{number}", prompt, SamplingParams(max_tokens=3), adapter)))
        for output in engine.step().outputs:
            outcomes[output.request_id] = output.finish_reason or ""
    for digest in digests:
        engine.handle(Pin(digest, False))
    deadline = time.monotonic() + 60
    while engine.is_waiting:
        assert time.monotonic() < deadline, "the engine did not come to rest"
        for output in engine.step().outputs:
            outcomes[output.request_id] = output.finish_reason or ""
        if not engine.has_work:
            time.sleep(0.001)
    engine.close()
    assert {"length", "error"} <= set(outcomes.values())
    assert decoder.hash_weights() == before


def test_the_hash_is_of_every_weight_and_notices_a_single_changed_byte(decoder: Decoder) -> None:
    names = {name for name, _ in decoder.buffers()}
    for layer in range(decoder.spec.num_layers):
        assert {f"layers.{layer}.{group}.0" for group in ("qkv", "o", "gate_up", "down")} <= names
    before = decoder.hash_weights()
    for weight in (decoder.embed, decoder.final_norm, decoder.layers[0].input_norm):
        first = weight.view(-1).view(torch.uint8)[:1]
        first ^= 1
        assert decoder.hash_weights() != before
        first ^= 1
    assert decoder.hash_weights() == before


requests = st.lists(
    st.tuples(
        st.sampled_from([None, "all-8", "qv-3", "mlp-16"]),
        st.lists(st.integers(0, 255), min_size=1, max_size=40),
        st.integers(1, 8),
        st.sampled_from([0.0, 1.0]),
    ),
    min_size=2,
    max_size=9,
)


@pytest.fixture(scope="module")
def alone(decoder: Decoder, adapters: dict[str, Path]) -> Iterator[Engine]:
    engine = real_engine(decoder, adapters, prefix_cache=False)
    yield engine
    engine.close()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=requests, budget=st.sampled_from([16, 24, 64]), blocks=st.sampled_from([24, 129]), prefixes=st.booleans())
def test_a_mixed_batch_answers_as_each_request_alone(
    decoder: Decoder,
    adapters: dict[str, Path],
    alone: Engine,
    asked: list[tuple[str | None, list[int], int, float]],
    budget: int,
    blocks: int,
    prefixes: bool,
) -> None:
    wanted = [
        Request(
            str(number),
            tuple(prompt),
            SamplingParams(max_tokens=length, temperature=temperature, seed=number, num_logprobs=0),
            adapter,
        )
        for number, (adapter, prompt, length, temperature) in enumerate(asked)
    ]
    engine = real_engine(decoder, adapters, max_batched_tokens=budget, kv_blocks=blocks, prefix_cache=prefixes)
    try:
        together = run(engine, wanted)
    finally:
        engine.close()
    for request in wanted:
        single = run(alone, [request])[request.id]
        assert together[request.id].token_ids == single.token_ids
        ours = torch.tensor([score.logprob for score in together[request.id].logprobs])
        theirs = torch.tensor([score.logprob for score in single.logprobs])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
