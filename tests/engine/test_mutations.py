"""An adapter that differs from what peft saved is served exactly as its folder says, or refused with a reason.

``--mutations 1000`` runs that many.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch

from loraplex_adapters.errors import AdapterError
from loraplex_adapters.format import read
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.dense import DenseModel, Misplaced
from tests.engine.support import real_engine, run
from tests.features import make_feature
from tests.models import make_checkpoint
from tests.mutations import mutate

SOURCES = (
    "lora",
    "patterns",
    "layers",
    "dora-patterns",
    "head",
    "embeddings-dora",
    "whole-both",
    "tokens",
    "everything",
)
PROMPT = (104, 7, 50, 100, 9, 261, 33, 80, 7, 12)


def test_mutants_are_served_exactly_or_refused(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", "llama")
    decoder = load(checkpoint, device="cpu", dtype=torch.float32, quantization="none")
    dense = DenseModel(checkpoint)
    sources = [make_feature(tmp_path / name, checkpoint, name, seed) for seed, name in enumerate(SOURCES)]
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    refusals: list[tuple[str, str]] = []
    for seed in range(pytestconfig.getoption("--mutations")):
        folder = tmp_path / f"mutant-{seed}"
        what = mutate(seed, sources[seed % len(sources)], folder)
        try:
            read(folder, decoder.base_shape)
        except AdapterError as refusal:
            outcomes[refusal.code] += 1
            refusals.append((what, str(refusal)))
            continue
        outcomes["served"] += 1
        if (why := _what_is_wrong(decoder, dense, folder)) is not None:
            wrong.append(f"{what}: {why}")
    assert not wrong, "\n".join(wrong)
    assert [what for what, reason in refusals if len(reason) <= 20] == []
    # Both happen: most changes are refused, for many different reasons, and the harmless ones are served.
    assert outcomes["served"] > 0.1 * outcomes.total(), outcomes
    assert len(outcomes) > 8, outcomes
    print(dict(outcomes.most_common()))


def _what_is_wrong(decoder: Decoder, dense: DenseModel, folder: Path) -> str | None:
    """How the served answer differs from what the folder says; None if it does not."""
    try:
        expected = dense.logprobs(folder, PROMPT)
    except Misplaced as misplaced:
        return f"served, but {misplaced}"
    engine = real_engine(decoder, {"mutant": folder})
    params = SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=20, ignore_eos=True)
    found = run(engine, [Request("mutant", PROMPT, params, "mutant")])["mutant"]
    engine.close()
    if found.last.failure is not None:
        return f"accepted, but {found.last.failure.message}"
    difference = max(abs(logprob - expected[token].item()) for token, logprob in found.logprobs[0].top)
    return None if difference <= 1e-4 else f"log-probabilities differ by {difference:.1e}"
