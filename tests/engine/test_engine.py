"""The engine's promises when things go wrong, and how requests end."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from loraplex_server.engine.messages import Abort, Submit
from loraplex_server.engine.runner import Launched, Runner
from loraplex_server.engine.scheduler import Plan
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.engine.support import real_engine, run
from tests.models import make_adapter, make_checkpoint


class Parts(NamedTuple):
    decoder: Decoder
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    root = tmp_path_factory.mktemp("engine")
    checkpoint = make_checkpoint(root / "base")
    adapters = {name: make_adapter(root / name, checkpoint, seed=seed) for seed, name in enumerate("ab")}
    decoder = load(checkpoint, device="cpu", dtype=torch.float32, quantization="nf4")
    return Parts(decoder, adapters)


def request(name: str, *, adapter: str | None = None, num_prompt: int = 6, **sampling: object) -> Request:
    params = SamplingParams(**{"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return Request(name, tuple(range(num_prompt)), params, adapter)


def test_out_of_memory_costs_the_largest_request_only(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = real_engine(*parts)
    healthy = run(engine, [request("small")])["small"].token_ids
    launch = Runner.launch
    failures = iter([True])

    def fail_once(self: Runner, plan: Plan) -> Launched:
        if next(failures, False):
            raise torch.OutOfMemoryError("no memory")
        return launch(self, plan)

    monkeypatch.setattr(Runner, "launch", fail_once)
    found = run(engine, [request("large", num_prompt=40), request("small")])
    assert found["large"].last.failure is not None
    assert found["large"].last.failure.code == "out_of_memory"
    assert found["small"].token_ids == healthy
    assert run(engine, [request("next")])["next"].token_ids == healthy
    engine.close()


def test_a_failed_step_ends_its_requests_and_not_the_engine(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = real_engine(*parts)
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "launch", lambda self, plan: 1 / 0)
        failure = run(engine, [request("bad", adapter="a")])["bad"].last.failure
    assert failure is not None
    assert failure.code == "engine_error"
    assert len(run(engine, [request("good", adapter="a")])["good"].token_ids) == 6
    stats = engine.step().stats
    assert stats is not None
    assert stats.kv_blocks_used == 0
    engine.close()


def test_an_adapter_that_overflows_fails_alone(parts: Parts, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(parts.adapters["a"] / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, broken / "adapter_model.safetensors")
    (broken / "adapter_config.json").write_bytes((parts.adapters["a"] / "adapter_config.json").read_bytes())
    engine = real_engine(parts.decoder, {**parts.adapters, "broken": broken})
    alone = {name: run(engine, [request(name, adapter=name)])[name].token_ids for name in "ab"}
    together = run(engine, [request(name, adapter=name) for name in ("a", "broken", "b")])
    assert together["broken"].last.failure is not None
    assert "not numbers" in together["broken"].last.failure.message
    assert {name: together[name].token_ids for name in "ab"} == alone
    engine.close()


def test_the_base_never_changes(parts: Parts) -> None:
    before = parts.decoder.hash_weights()
    engine = real_engine(*parts, adapter_bytes=60_000)
    for i in range(20):
        name = "ab"[i % 2]
        run(engine, [request(f"{i}", adapter=name), request(f"{i}-base")])
    engine.close()
    assert parts.decoder.hash_weights() == before


def test_how_requests_end(parts: Parts) -> None:
    engine = real_engine(*parts, eos_ids=frozenset())
    tokens = run(engine, [request("plain")])["plain"].token_ids
    stop = next(token for i, token in enumerate(tokens) if token not in tokens[:i] and i > 0)
    at = tokens.index(stop)
    found = run(
        engine,
        [
            request("length"),
            request("stop-token", stop_token_ids=(stop,)),
            request("minimum", stop_token_ids=(stop,), min_tokens=at + 2),
            request("context", num_prompt=253, max_tokens=50),
        ],
    )
    assert found["length"].last.finish_reason == "length"
    assert found["stop-token"].token_ids == tokens[: at + 1]
    assert found["stop-token"].last.finish_reason == "stop"
    assert found["stop-token"].last.stop_token_id == stop
    assert len(found["minimum"].token_ids) >= at + 2
    assert (found["context"].last.finish_reason, len(found["context"].token_ids)) == ("length", 3)
    engine.close()


def test_the_end_of_text_ends_unless_it_is_ignored(parts: Parts) -> None:
    plain = real_engine(*parts)
    tokens = run(plain, [request("r")])["r"].token_ids
    plain.close()
    engine = real_engine(*parts, eos_ids=frozenset({tokens[0]}))
    found = run(engine, [request("ends", ignore_eos=False), request("goes-on", ignore_eos=True)])
    assert found["ends"].token_ids == tokens[:1]
    assert found["ends"].last.finish_reason == "stop"
    assert found["goes-on"].token_ids == tokens
    engine.close()


def test_too_long_a_prompt_is_refused_and_an_aborted_request_leaves_nothing(parts: Parts) -> None:
    engine = real_engine(*parts)
    failure = run(engine, [request("long", num_prompt=256)])["long"].last.failure
    assert failure is not None
    assert failure.code == "context_too_long"
    engine.handle(Submit(request("gone", adapter="a", max_tokens=100)))
    for _ in range(50):
        engine.step()
    engine.handle(Abort("gone"))
    report = engine.step()
    assert [output.finish_reason for output in report.outputs] == ["abort"]
    assert report.stats is not None
    assert (report.stats.num_running, report.stats.kv_blocks_used) == (0, 0)
    engine.close()


def test_seeded_answers_do_not_depend_on_the_batch(parts: Parts) -> None:
    engine = real_engine(*parts)

    def seeded(name: str, seed: int, adapter: str | None) -> Request:
        return request(name, adapter=adapter, temperature=1.0, top_p=0.95, seed=seed, max_tokens=12)

    alone = run(engine, [seeded("r", 7, "a")])["r"].token_ids
    crowd = [seeded(f"c{i}", i, (None, "a", "b")[i % 3]) for i in range(9)]
    assert run(engine, [*crowd, seeded("r", 7, "a")])["r"].token_ids == alone
    assert run(engine, [seeded("r", 8, "a")])["r"].token_ids != alone
    engine.close()
