"""Decode rows on a GPU: nothing is allocated in a steady step, and no request sends its batch to the plain path."""

from pathlib import Path

import pytest
import torch

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.messages import Submit
from loraplex_server.engine.sequence import Request, SamplingParams, Sequence
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.engine.support import real_engine, run
from tests.models import make_adapter, make_checkpoint

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from loraplex_server.engine.decode_path import DecodePath  # isort: skip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ASKS: list[dict[str, object]] = [
    {},
    {"num_logprobs": 3},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "num_logprobs": 0},
    {"logit_bias": ((5, 3.0), (9, -100.0)), "presence_penalty": 0.5},
    {"min_tokens": 6, "ignore_eos": False, "stop_token_ids": (5, 9, 27)},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 11},
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, dict[str, Path]]:
    root = tmp_path_factory.mktemp("rows")
    checkpoint = make_checkpoint(root / "base")
    adapters = {name: make_adapter(root / name, checkpoint, seed=seed) for seed, name in enumerate("ab")}
    return load(checkpoint, device="cuda", dtype=torch.bfloat16, quantization="nf4"), adapters


def engine_of(parts: tuple[Decoder, dict[str, Path]], **limits: int) -> Engine:
    return real_engine(*parts, block_size=16, **limits)


def requests(num: int) -> list[Request]:
    found = []
    for i in range(num):
        asked = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 24, **ASKS[i % len(ASKS)]}
        params = SamplingParams(**asked)  # type: ignore[arg-type]
        found.append(Request(f"r{i}", tuple(range(i, i + 3 + 2 * i)), params, (None, "a", "b")[i % 3]))
    return found


def test_every_request_is_taken(parts: tuple[Decoder, dict[str, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []

    def takes(path: DecodePath, seqs: list[Sequence]) -> bool:
        found = original(path, seqs)
        if seqs:
            taken.append(found)
        return found

    original = DecodePath.takes
    monkeypatch.setattr(DecodePath, "takes", takes)
    engine = engine_of(parts, max_running=16)
    found = run(engine, requests(12))
    assert taken
    assert all(taken)
    for i, collected in enumerate(found.values()):
        reason = collected.last.finish_reason
        assert (reason, len(collected.token_ids)) == ("length", 24) or (reason == "stop" and i % len(ASKS) == 4)
        assert len(collected.token_ids) >= 6
    engine.close()


def test_log_probabilities_come_from_the_rows(parts: tuple[Decoder, dict[str, Path]]) -> None:
    engine = engine_of(parts, max_running=4)
    found = run(engine, requests(3))
    assert [len(entry.top) for entry in found["r1"].logprobs] == [3] * 24
    for entry in found["r1"].logprobs:
        assert entry.top[0][1] >= entry.logprob - 1e-3
        assert entry.top[0][0] == entry.token_id or entry.top[0][1] == pytest.approx(entry.logprob, abs=1e-3)
    assert [len(entry.top) for entry in found["r2"].logprobs] == [0] * 24
    engine.close()


@pytest.mark.parametrize("num", [1, 6])
def test_a_steady_step_allocates_nothing(parts: tuple[Decoder, dict[str, Path]], num: int) -> None:
    engine = engine_of(parts, max_running=8)
    run(engine, requests(num))  # captures what these requests need
    for request in requests(num):
        engine.handle(Submit(request))
    _steps(engine, 8)
    before = torch.cuda.memory_stats()
    _steps(engine, 8)
    after = torch.cuda.memory_stats()
    for name in ("allocation.all.allocated", "num_device_alloc"):
        assert after[name] == before[name], name
    engine.close()


def _steps(engine: Engine, num: int) -> None:
    for _ in range(num):
        engine.step()
