"""Every feature of adapters against peft, family by family: ``python -m tests.parity`` writes the table anew (minutes).

Each adapter answers alone, and in one batch with all others and the base; both are compared with transformers and peft
on the same weights in float32.
"""

import csv
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.sequence import Request, SamplingParams
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.loader import load
from tests.engine.support import Collected, real_engine, run
from tests.features import PEFT_COPY, PeftAnswers, features_of, make_feature
from tests.models import FAMILIES, make_checkpoint

TABLE: Final = Path(__file__).parent.parent / "benchmarks" / "results" / "parity_cpu.csv"
TOLERANCE: Final = 1e-4
_NUM_TOKENS: Final = 6
_PROMPT_TOKENS: Final = 24
# Tokens that some of the adapters train are in every prompt.
_TRAINED: Final = {3: 7, 5: 100, 8: 9, 11: 261}


@dataclass(frozen=True)
class Row:
    """One feature on one base. Differences are the largest of the log-probabilities of the five likeliest tokens at each
    position; ``effect`` is the same between the adapter and the base, so that a difference of nothing says something."""

    family: str
    base: str
    feature: str
    oracle: str
    tokens_equal_alone: bool
    difference_alone: float
    tokens_equal_mixed: bool
    difference_mixed: float
    effect: float

    @property
    def is_exact(self) -> bool:
        close = max(self.difference_alone, self.difference_mixed) <= TOLERANCE
        return close and self.tokens_equal_alone and self.tokens_equal_mixed


def measure(
    family: str,
    root: Path,
    *,
    nf4: bool = False,
    features: Sequence[str] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """A fresh base of the family below ``root``, with these features (None = all that it can have) beside each other.

    Where ``dtype`` is not float32, the log-probabilities are those of the served tokens, which rounding may choose.
    """
    # Larger weights would amplify bfloat16's rounding until nothing could be told.
    overrides = {} if dtype == torch.float32 else {"initializer_range": 0.05}
    checkpoint = make_checkpoint(root / "base", family, **overrides)
    decoder = load(checkpoint, device=device, dtype=dtype, quantization="nf4" if nf4 else "none")
    names = [name for name in features_of(family) if features is None or name in features]
    folders = {name: make_feature(root / name, checkpoint, name, seed) for seed, name in enumerate(names)}
    prompts = {name: _prompt(seed) for seed, name in enumerate(names)}
    with _engine(decoder, folders) as engine:
        alone: dict[str, Collected] = {}
        for name in names:
            alone |= run(engine, [_request(name, name, prompts[name])])
        plain = run(engine, [_request(f"base/{name}", None, prompts[name]) for name in names])
    with _engine(decoder, folders) as engine:
        everyone = [_request(name, name, prompts[name]) for name in names]
        mixed = run(engine, [*everyone, _request("base", None, prompts[names[0]])])
    assert mixed["base"].token_ids == plain[f"base/{names[0]}"].token_ids
    rows = []
    for name in names:
        answers = PeftAnswers(checkpoint, folders[name], name, nf4=nf4)
        tokens, scores = answers.greedy(prompts[name], _NUM_TOKENS)
        if dtype != torch.float32:
            served = alone[name].token_ids
            scores = answers.logprobs([*prompts[name], *served])[_PROMPT_TOKENS - 1 : -1]
        rows.append(
            Row(
                family,
                "nf4" if nf4 else "float32",
                name,
                "peft on an equal file" if (folders[name] / PEFT_COPY).exists() else "peft",
                alone[name].token_ids == tokens,
                _difference(alone[name], scores),
                mixed[name].token_ids == tokens,
                _difference(mixed[name], scores),
                _difference(plain[f"base/{name}"], scores),
            )
        )
    return rows


@contextmanager
def _engine(decoder: Decoder, folders: Mapping[str, Path]) -> Iterator[Engine]:
    limits: dict[str, Any] = {"adapter_bytes": 1 << 27, "max_running": 64, "kv_blocks": 1025, "max_batched_tokens": 512}
    engine = real_engine(decoder, folders, **limits)
    yield engine
    engine.close()


def _prompt(seed: int) -> tuple[int, ...]:
    tokens = torch.randint(0, 256, (_PROMPT_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
    for position, token in _TRAINED.items():
        tokens[position] = token
    return tuple(tokens)


def _request(name: str, adapter: str | None, prompt: tuple[int, ...]) -> Request:
    params = SamplingParams(max_tokens=_NUM_TOKENS, temperature=0.0, num_logprobs=5, ignore_eos=True)
    return Request(name, prompt, params, adapter)


def _difference(found: Collected, scores: torch.Tensor) -> float:
    """The largest difference of log-probabilities; a failed request has none that is small."""
    if found.last.failure is not None:
        return float("inf")
    worst = 0.0
    for position, entry in enumerate(found.logprobs):
        for token, logprob in ((entry.token_id, entry.logprob), *entry.top):
            worst = max(worst, abs(logprob - scores[position, token].item()) if token < scores.shape[1] else 0.0)
    return worst


def read_table() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(rows: Sequence[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shown = {key: f"{value:.1e}" if isinstance(value, float) else value for key, value in asdict(row).items()}
            writer.writerow(shown)


def main() -> None:
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for nf4 in (False, True):
        for family in FAMILIES:
            with tempfile.TemporaryDirectory() as root:
                rows += measure(family, Path(root), nf4=nf4)
    write_table(rows)
    if wrong := [row for row in rows if not row.is_exact]:
        sys.exit(f"not exact: {wrong}")


if __name__ == "__main__":
    main()
