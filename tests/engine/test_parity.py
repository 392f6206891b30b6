"""Served answers equal transformers and peft on the same weights, however the requests are batched and cut up."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.engine.reference import Answer, Reference
from tests.engine.support import Collected, real_engine, run
from tests.models import FAMILIES, make_adapter, make_checkpoint

# Ranks and targets of the four adapters that share a batch with the base.
ADAPTERS: dict[str, dict[str, Any]] = {
    "all-8": {"rank": 8},
    "qv-3": {"rank": 3, "targets": ("q_proj", "v_proj"), "use_rslora": True},
    "mlp-16": {"rank": 16, "targets": ("gate_proj", "up_proj", "down_proj"), "lora_alpha": 32},
    "mixed": {"rank": 4, "rank_pattern": {"o_proj": 12}, "alpha_pattern": {"k_proj": 20}, "layers_to_transform": [1]},
}
NUM_TOKENS = 8
FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 2e-2


class Case(NamedTuple):
    """``reference`` computes in float32 on the same weights, also where the decoder does not. ``tolerance`` is what
    the served dtype may stray from it: in bfloat16 2e-2, or as far as transformers and peft stray themselves when they
    compute in bfloat16 (with bitsandbytes' NF4 on a CPU, up to 1e-1)."""

    decoder: Decoder
    adapters: dict[str, Path]
    reference: Reference
    tolerance: float
    expected: dict[str, Answer]

    @property
    def exact(self) -> bool:
        return self.tolerance == FLOAT32_TOLERANCE


def prompts() -> dict[str, tuple[str | None, list[int]]]:
    """Request id -> (adapter, prompt): two prompts for the base and for every adapter."""
    found: dict[str, tuple[str | None, list[int]]] = {}
    generator = torch.Generator().manual_seed(3)
    for name in (None, *ADAPTERS):
        for length in (5, 37):
            tokens = torch.randint(0, 256, (length,), generator=generator).tolist()
            found[f"{name}/{length}"] = (name, tokens)
    return found


@pytest.fixture(
    scope="module",
    params=[
        *(
            pytest.param((family, quantization, torch.float32, "cpu"), id=f"{family}-{quantization}-float32")
            for family in FAMILIES
            for quantization in ("none", "nf4")
        ),
        pytest.param(("llama", "nf4", torch.bfloat16, "cpu"), id="llama-nf4-bfloat16"),
        pytest.param(("qwen2", "none", torch.bfloat16, "cpu"), id="qwen2-none-bfloat16"),
        *(
            pytest.param((family, "nf4", torch.bfloat16, "cuda"), id=f"{family}-nf4-gpu", marks=pytest.mark.gpu)
            for family in FAMILIES
        ),
        pytest.param(("llama", "none", torch.float32, "cuda"), id="llama-none-float32-gpu", marks=pytest.mark.gpu),
    ],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, quantization, dtype, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    root = tmp_path_factory.mktemp(family)
    overrides: dict[str, Any] = {"sliding_window": 16} if family == "mistral" else {}
    if dtype == torch.bfloat16:
        # Larger weights would amplify bfloat16's rounding until nothing could be told.
        overrides["initializer_range"] = 0.05
    checkpoint = make_checkpoint(root / "base", family, **overrides)
    adapters = {
        name: make_adapter(root / name, checkpoint, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    decoder = load(checkpoint, device=torch.device(device), dtype=dtype, quantization=quantization)
    reference = Reference(checkpoint, adapters, dtype=torch.float32, nf4=quantization == "nf4")
    expected = {key: reference.greedy(ids, name, NUM_TOKENS) for key, (name, ids) in prompts().items()}
    tolerance = FLOAT32_TOLERANCE
    if dtype == torch.bfloat16:
        peer = Reference(checkpoint, adapters, dtype=dtype, nf4=quantization == "nf4")
        strays = [
            (peer.logprobs(ids, name) - reference.logprobs(ids, name)).abs().max().item()
            for name, ids in prompts().values()
        ]
        tolerance = max(BFLOAT16_TOLERANCE, *strays)
    return Case(decoder, adapters, reference, tolerance, expected)


def requests(case: Case, *, logprobs: bool = True, **sampling: Any) -> list[Request]:
    num_logprobs = 5 if logprobs else None
    params = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.0, num_logprobs=num_logprobs, ignore_eos=True, **sampling
    )
    return [Request(key, tuple(ids), params, name) for key, (name, ids) in prompts().items()]


def check(case: Case, found: dict[str, Collected], only: str = "") -> None:
    """Tokens equal the reference's; so do log-probabilities. In bfloat16 two tokens within rounding may trade places,
    and from there on the reference follows the served tokens."""
    tolerance = case.tolerance
    for key, (name, prompt) in prompts().items():
        if not key.startswith(only):
            continue
        got, expected = found[key], case.expected[key]
        assert got.last.finish_reason == "length", got.last
        scores = expected.logprobs
        if tuple(got.token_ids) != expected.token_ids:
            assert not case.exact, f"{key}: {got.token_ids} instead of {expected.token_ids}"
            scores = case.reference.logprobs([*prompt, *got.token_ids], name)[len(prompt) - 1 : -1]
            chosen = scores.gather(1, torch.tensor(got.token_ids)[:, None])[:, 0]
            assert (scores.max(dim=1).values - chosen).max() <= 2 * tolerance, f"{key} differs beyond rounding"
        for position, entry in enumerate(got.logprobs):
            assert abs(entry.logprob - scores[position, entry.token_id].item()) <= tolerance, (key, position)
            for token, logprob in entry.top:
                assert abs(logprob - scores[position, token].item()) <= tolerance, (key, position, token)


def serve(case: Case, **limits: Any) -> tuple[Engine, dict[str, Collected]]:
    engine = real_engine(case.decoder, case.adapters, **limits)
    return engine, run(engine, requests(case))


def test_one_mixed_batch_answers_as_peft(case: Case) -> None:
    engine, found = serve(case, max_batched_tokens=512)
    check(case, found)
    engine.close()


def test_without_logprobs_the_tokens_are_the_same(case: Case) -> None:
    engine = real_engine(case.decoder, case.adapters)
    check(case, run(engine, requests(case, logprobs=False)))
    engine.close()


def test_prompts_cut_into_chunks_answer_the_same(case: Case) -> None:
    engine, found = serve(case, max_batched_tokens=17)
    check(case, found)
    engine.close()


def test_prefix_cache_hits_answer_the_same(case: Case) -> None:
    engine, _ = serve(case)
    again = run(engine, requests(case))
    check(case, again)
    assert {again[key].outputs[0].cached_tokens for key in again if key.endswith("/37")} == {36}
    engine.close()


def test_preempted_requests_answer_the_same(case: Case) -> None:
    # Room for about four of the ten; a first round brings the adapters in, so that the second starts all at once.
    engine, _ = serve(case, kv_blocks=34, max_batched_tokens=512, prefix_cache=False)
    check(case, run(engine, requests(case)))
    stats = engine.step().stats
    assert stats is not None
    assert stats.num_preemptions > 0
    engine.close()


def test_the_base_alone_answers_the_same(case: Case) -> None:
    engine = real_engine(case.decoder, case.adapters)
    found = run(engine, [request for request in requests(case, logprobs=False) if request.adapter is None])
    check(case, found, "None")
    engine.close()


def test_each_request_alone_answers_as_in_the_batch(case: Case) -> None:
    engine = real_engine(case.decoder, case.adapters, prefix_cache=False)
    found: dict[str, Collected] = {}
    for request in requests(case):
        found |= run(engine, [request])
    check(case, found)
    engine.close()


def test_prompt_logprobs_are_those_of_the_reference(case: Case) -> None:
    engine = real_engine(case.decoder, case.adapters, max_batched_tokens=17)
    found = run(engine, requests(case, num_prompt_logprobs=2))
    check(case, found)
    for key, (name, prompt) in prompts().items():
        scores = case.reference.logprobs(prompt, name)
        entries = found[key].outputs[0].prompt_logprobs
        assert [entry.token_id for entry in entries] == prompt[1:]
        for position, entry in enumerate(entries):
            assert abs(entry.logprob - scores[position, entry.token_id].item()) <= case.tolerance
    engine.close()
