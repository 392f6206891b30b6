"""One forward pass of any plan: it becomes a batch, the batch becomes tokens.

``begin`` makes the batch, ``advance`` queues some of its layers on the device, ``launch`` what is left, and ``collect``
reads what came of it; between these the host, and the device's stream, are free for others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loraplex_server.engine.sampler import Drawn, Sampled, Sampler, token_logprobs
from loraplex_server.engine.scheduler import Chunk, Plan
from loraplex_server.engine.sequence import Sequence, TokenLogprob
from loraplex_server.kernels.sampling_logprobs_ref import logprobs_ref
from loraplex_server.model.adapters import AdapterLookup
from loraplex_server.model.batch import Batch, Segment, send
from loraplex_server.model.decoder import Decoder
from loraplex_server.model.kv_cache import KVCache

if TYPE_CHECKING:
    from loraplex_server.engine.prompt_path import PromptPass, PromptPath

# Rows of logits held at once while prompt log-probabilities are computed; bounds memory at large vocabularies.
_PROMPT_LOGIT_ROWS = 256


@dataclass(slots=True)
class UnderWay:
    """A plan that has begun. ``prompts`` None: it has no layers of its own, and is launched in one piece."""

    plan: Plan
    batch: Batch
    prompts: PromptPass | None
    num_layers: int
    num_done: int = 0

    def advance(self, num_layers: int) -> bool:
        """Queue layers, but never the last; whether that is to be launched now."""
        if self.prompts is None or self.num_done + num_layers >= self.num_layers:
            return True
        self.prompts.advance(num_layers)
        self.num_done += num_layers
        return False

    def drop(self, seq: Sequence) -> None:
        """The sequence has ended: its blocks may belong to others, so the layers to come write nothing for it."""
        row = 0
        for chunk in self.plan.chunks:
            if chunk.seq is seq:
                self.batch.kv_slots[row : row + chunk.length] = -1
            row += chunk.length


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that runs on the device."""

    plan: Plan
    sampled: tuple[Sequence, ...]
    drawn: Drawn | None
    prompt_logprobs: dict[int, list[TokenLogprob]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought: a token for each sequence that sampled, and log-probabilities of prompt tokens by the
    identity of their sequence."""

    plan: Plan
    sampled: tuple[tuple[Sequence, Sampled], ...]
    prompt_logprobs: dict[int, list[TokenLogprob]]


class Runner:
    """Runs plans on one decoder and one KV cache."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        adapters: AdapterLookup,
        sampler: Sampler,
        prompts: PromptPath | None = None,
    ) -> None:
        self._prompts = prompts
        self._decoder = decoder
        self._kv = kv
        self._adapters = adapters
        self._sampler = sampler
        self._device = decoder.device

    @property
    def goes_by_layers(self) -> bool:
        """Whether others can have the device between the layers of a plan."""
        return self._prompts is not None

    def begin(self, plan: Plan) -> UnderWay:
        """Nothing else may begin before it is launched."""
        batch = build_batch(plan, self._kv.block_size, self._device)
        prompts = self._prompts
        # Adapters that change more than the layers' linears run through the plain pass, which knows all they do.
        if prompts is not None and any(self._adapters.outside(s.slot) for s in batch.segments):
            prompts = None
        return UnderWay(plan, batch, prompts.start(batch) if prompts else None, self._decoder.spec.num_layers)

    @torch.inference_mode()
    def launch(self, under_way: UnderWay) -> Launched:
        """Queue what is left of it, and the sampling."""
        plan, batch = under_way.plan, under_way.batch
        if under_way.prompts is not None:
            hidden = under_way.prompts.finish()
        else:
            hidden = self._decoder.forward(batch, self._kv, self._adapters)
        seqs = tuple(chunk.seq for chunk in plan.chunks if chunk.samples)
        drawn = None
        if seqs:
            logits = self._decoder.logits(hidden[batch.logit_rows], _logit_segments(seqs), self._adapters)
            drawn = self._sampler.draw(logits, seqs)
        return Launched(plan, seqs, drawn, self._score_prompts(plan, hidden))

    def collect(self, launched: Launched) -> StepResult:
        outcomes = self._sampler.read(launched.drawn, launched.sampled) if launched.drawn else []
        return StepResult(launched.plan, tuple(zip(launched.sampled, outcomes, strict=True)), launched.prompt_logprobs)

    def _score_prompts(self, plan: Plan, hidden: Tensor) -> dict[int, list[TokenLogprob]]:
        """Log-probabilities of the prompt tokens that this step's rows predict."""
        scores: dict[int, list[TokenLogprob]] = {}
        row = 0
        for chunk in plan.chunks:
            k = chunk.seq.request.sampling.num_prompt_logprobs
            if k is not None:
                # Row i predicts token start + i + 1; the last prompt token's row predicts the answer, not the prompt.
                stop = min(chunk.start + chunk.length, chunk.seq.num_prompt - 1)
                targets = chunk.seq.tokens[chunk.start + 1 : stop + 1]
                scores[id(chunk.seq)] = list(self._score(hidden[row : row + len(targets)], targets, k, chunk.seq.slot))
            row += chunk.length
        return scores

    def _score(self, hidden: Tensor, targets: list[int], k: int, slot: int) -> Iterable[TokenLogprob]:
        for i in range(0, len(targets), _PROMPT_LOGIT_ROWS):
            ids = targets[i : i + _PROMPT_LOGIT_ROWS]
            segments = [Segment(slot, 0, len(ids))] if slot >= 0 else []
            logits = self._decoder.logits(hidden[i : i + len(ids)], segments, self._adapters)
            found = logprobs_ref(logits, torch.tensor(ids, device=logits.device), k)
            yield from token_logprobs(ids, *found, [k] * len(ids))


def build_batch(plan: Plan, block_size: int, device: torch.device) -> Batch:
    """Flatten a plan's chunks into the tensors of one forward pass."""
    lengths = np.array([chunk.length for chunk in plan.chunks])
    kv_lens = [chunk.start + chunk.length for chunk in plan.chunks]
    tables = np.zeros((len(plan.chunks), max(-(-n // block_size) for n in kv_lens)), np.int32)
    token_ids, positions, kv_slots = [], [], []
    for table, chunk, stop in zip(tables, plan.chunks, kv_lens, strict=True):
        blocks = chunk.seq.block_ids[: -(-stop // block_size)]
        table[: len(blocks)] = blocks
        position = np.arange(chunk.start, stop)
        token_ids.append(np.array(chunk.seq.tokens[chunk.start : stop], np.int64))
        positions.append(position)
        kv_slots.append(table[position // block_size].astype(np.int64) * block_size + position % block_size)
    query_starts = np.concatenate(([0], lengths.cumsum()))
    samples = [i for i, chunk in enumerate(plan.chunks) if chunk.samples]

    def put(values: npt.ArrayLike, dtype: npt.DTypeLike) -> Tensor:
        return send(torch.from_numpy(np.asarray(values, dtype)), device)

    return Batch(
        token_ids=put(np.concatenate(token_ids), np.int64),
        positions=put(np.concatenate(positions), np.int64),
        kv_slots=put(np.concatenate(kv_slots), np.int64),
        query_starts=put(query_starts, np.int32),
        kv_lens=put(kv_lens, np.int32),
        block_tables=put(tables, np.int32),
        token_adapters=put(np.repeat([chunk.seq.slot for chunk in plan.chunks], lengths), np.int32),
        logit_rows=put(query_starts[1:][samples] - 1, np.int64),
        query_lens=tuple(chunk.length for chunk in plan.chunks),
        prefix_and_query_lens=tuple(kv_lens),
        segments=tuple(_segments(plan.chunks)),
    )


def _segments(chunks: Iterable[Chunk]) -> Iterable[Segment]:
    slot, start, row = -1, 0, 0
    for chunk in chunks:
        if chunk.seq.slot != slot:
            if slot >= 0:
                yield Segment(slot, start, row)
            slot, start = chunk.seq.slot, row
        row += chunk.length
    if slot >= 0:
        yield Segment(slot, start, row)


def _logit_segments(seqs: Iterable[Sequence]) -> list[Segment]:
    """Which of the rows that sample use which adapter."""
    return [Segment(seq.slot, row, row + 1) for row, seq in enumerate(seqs) if seq.slot >= 0]
